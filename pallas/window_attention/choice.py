"""Which platforms run the kernels where nobody asks for anything, and why."""

from pallas.dispatch import Kernels, Rule
from pallas.window_attention import gpu, tpu

# By the compiler's estimates for a v5e, XLA moves 19 to 125 times the bytes that the kernels must
# (benchmarks/results/kernels_compiled.json); on hardware nothing is measured yet.
AUTO = {
    "tpu": Rule(True, "one pass over the map"),
    "cuda": Rule(False, "the kernel is not yet measured to be faster"),
    "cpu": Rule(False, "there is no kernel for platform cpu"),
}
KERNELS = Kernels(tpu, gpu, AUTO)
