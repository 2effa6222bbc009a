"""Which implementation serves which shape on which platform, and why.

| platform | shape | "auto" | "pallas" | why |
|---|---|---|---|---|
| TPU | all but maps of thousands of columns | kernel | kernel | see below |
| GPU | groups of 8, 16, 24 or 32 channels | XLA | kernel | not yet measured to be faster |
| GPU | others | XLA | XLA | a lane moves 16 bytes, and holds a group in its registers |
| CPU | all | XLA | TPU kernel, interpreted | to test it: hundreds of times slower |

On TPUs nothing was measured yet, as none was at hand. By the compiler's count for a v5e, which has
16 GB, XLA's gathers need 4 to 40 GB besides arguments and result, for 128 images in the base model;
the kernels' programs need 0.1 to 0.9 GB (`benchmarks/results/kernels_compiled.json`).

`pallas/dispatch.py` reads this table.
"""

from pallas.deformable_conv import gpu, tpu
from pallas.dispatch import Kernels

KERNELS = Kernels(tpu, gpu)
