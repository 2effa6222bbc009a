"""Which implementation serves which shape on which platform, and why.

| platform | shape | "auto" | "pallas" | why |
|---|---|---|---|---|
| TPU | fits into every core since v4 | kernel | kernel | see below |
| TPU | fits into larger cores only | XLA | kernel | a program must compile wherever it is sent |
| GPU | those that `refusal` lets pass | XLA | kernel | until it is measured to be faster |
| CPU | all | XLA | TPU kernel, interpreted | to test it: hundreds of times slower |

On TPUs nothing was measured yet, as none was at hand. By the compiler's estimates for a v5e, XLA
moves 19 to 125 times the bytes that the kernels must
(`benchmarks/results/kernels_compiled.json`).

Everything else runs as XLA compiles `reference.py`. `pallas/dispatch.py` reads this table.
"""

from pallas.dispatch import Kernels
from pallas.window_attention import gpu, gpu_halo, tpu, tpu_halo
from pallas.window_attention.geometry import Halo, Windows


def kernels(geometry: Windows | Halo) -> Kernels:
    """The modules that serve a geometry."""
    return Kernels(tpu_halo, gpu_halo) if isinstance(geometry, Halo) else Kernels(tpu, gpu)
