"""Which implementation serves which shape on which platform, and why.

| platform | shape | "auto" | "pallas" | why |
|---|---|---|---|---|
| TPU | fits into every core since v4 | kernel | kernel | see below |
| TPU | fits into larger cores only | XLA | kernel | a program must compile wherever it is sent |
| GPU | all | XLA | XLA | there is no kernel yet |
| CPU | all | XLA | TPU kernel, interpreted | to test it: hundreds of times slower |

On TPUs nothing was measured yet, as none was at hand. For 128 images XLA's gathers do not even
compile on a v5e for the first two stages of the base model: they need 23 to 37 GB.

`pallas/dispatch.py` reads this table.
"""

from pallas.deformable_conv import tpu
from pallas.dispatch import Kernels

KERNELS = Kernels(tpu, None)
