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

Everything else runs as XLA compiles `reference.py`.
"""

from typing import NamedTuple

from pallas.window_attention import gpu, gpu_halo, tpu, tpu_halo
from pallas.window_attention.geometry import Halo, Windows

IMPLEMENTATIONS = ("auto", "pallas", "xla")
PLATFORMS = ("tpu", "cuda", "cpu")


class Choice(NamedTuple):
    """What runs, and the reason in words."""

    kernel: str | None  # "tpu", "gpu" or "tpu interpreted"; None: XLA
    why: str


def choose(implementation: str, platform: str, geometry: Windows | Halo) -> Choice:
    """What runs a shape.

    Args:
      implementation: "auto", "pallas" (a kernel wherever there is one) or "xla".
      platform: one of PLATFORMS; all others run XLA.

    Raises:
      ValueError: unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: expected one of {IMPLEMENTATIONS}")
    if implementation == "xla":
        return Choice(None, "asked for")
    automatic = implementation == "auto"
    if platform == "cuda":
        refusal = gpu_kernels(geometry).refusal(geometry)
        if refusal or automatic:
            return Choice(None, refusal or "the kernel is not yet measured to be faster")
        return Choice("gpu", "asked for")
    if platform not in ("tpu", "cpu") or (platform == "cpu" and automatic):
        return Choice(None, f"there is no kernel for platform {platform}")
    refusal = tpu_kernels(geometry).refusal(geometry, every_core=automatic)
    if refusal:
        return Choice(None, refusal)
    if platform == "cpu":
        return Choice("tpu interpreted", "asked for: slow, to test the kernel")
    return Choice("tpu", "one pass over the map" if automatic else "asked for")


def tpu_kernels(geometry: Windows | Halo):
    """The module with `forward`, `backward` and `refusal` for this geometry."""
    return tpu_halo if isinstance(geometry, Halo) else tpu


def gpu_kernels(geometry: Windows | Halo):
    """The same for GPUs."""
    return gpu_halo if isinstance(geometry, Halo) else gpu
