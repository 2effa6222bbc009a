"""Which platforms run the kernels where nobody asks for anything, and why."""

from pallas.dispatch import Kernels, Rule
from pallas.halo_attention import gpu, tpu

# On hardware nothing is measured yet; the compiler's estimates: window_attention/choice.py.
AUTO = {
    "tpu": Rule(True, "one pass over the map"),
    "cuda": Rule(False, "the kernel is not yet measured to be faster"),
    "cpu": Rule(False, "there is no kernel for platform cpu"),
}
KERNELS = Kernels(tpu, gpu, AUTO)
