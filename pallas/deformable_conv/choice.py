"""Which platforms run the kernels where nobody asks for anything, and why."""

from pallas.deformable_conv import gpu, tpu
from pallas.dispatch import Kernels, Rule

# By the compiler's count for a v5e of 16 GB, XLA's gathers need 4 to 40 GB besides arguments
# and result, for 128 images in the base model; the kernels' programs need 0.1 to 0.9 GB
# (benchmarks/results/kernels_compiled.json). On hardware nothing is measured yet.
AUTO = {
    "tpu": Rule(True, "one pass over the map"),
    "cuda": Rule(False, "the kernel is not yet measured to be faster"),
    "cpu": Rule(False, "there is no kernel for platform cpu"),
}
KERNELS = Kernels(tpu, gpu, AUTO)
