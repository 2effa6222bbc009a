"""The contract between the frame and a token mixer."""

from typing import NamedTuple

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float


class Place(NamedTuple):
    """The place in the model where a mixer stands; it may build itself accordingly."""

    stage: int  # 0 to 3
    block: int  # 0, 1, … within the stage
    side: int  # of the stage's map, the shorter, for images of the size the model is built for
    detection: bool  # whether images of any size will come
    implementation: str = "auto"  # of its operation in pallas/: "auto", "pallas" or "xla"


class Mixer(nnx.Module):
    """Moves information between the places of a map, and nothing else; [B, H, W, C] → the same.

    The frame builds one for every block and gives it the map after the block's first norm. What
    else a mixer may have is here, with what most have.
    """

    norm_epsilon = 1e-6  # of both norms of its blocks
    widths = (1, 1, 1, 1)  # what the channels of each stage must be multiples of
    needs_square = False  # whether it is built for images of one side
    has_kernels = False  # whether it has an operation of `pallas/`

    def __init__(self, dim: int, place: Place, *, dtype: DTypeLike, rngs: nnx.Rngs):
        """Builds a mixer of `dim` channels that computes in `dtype`."""

    def add_positions(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Adds learned positions to the block's input, before its first norm; most have none."""
        return x

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        raise NotImplementedError
