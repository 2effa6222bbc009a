"""What a kernel must know of its arguments, and their checks."""

import dataclasses

import jax.numpy as jnp
import numpy as np

DTYPES = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class Sampling:
    """All that a kernel must know beforehand, but for the batch."""

    height: int
    width: int
    out_height: int
    out_width: int
    groups: int
    channels: int  # of a group
    kernel_size: int
    dtype: str
    stride: int = 1
    padding: int | None = None
    dilations: tuple[int, ...] = (1,)
    offset_scale: float = 1.0
    remove_center: bool = False

    @classmethod
    def of(cls, value, offsets, mask, **options) -> "Sampling":
        """Checks the arguments; raises ValueError naming the one that does not fit."""
        if value.ndim != 5:
            raise ValueError(f"value has shape {value.shape}: expected [B, H, W, groups, channels]")
        if value.dtype.name not in DTYPES:
            raise ValueError(f"value is {value.dtype.name}: expected {' or '.join(DTYPES)}")
        if offsets.ndim != 6:
            raise ValueError(
                f"offsets has shape {offsets.shape}: expected [B, Ho, Wo, groups, points, 2]"
            )
        batch, height, width, groups, channels = value.shape
        down, across = offsets.shape[1:3]
        geometry = cls(
            height, width, down, across, groups, channels, dtype=value.dtype.name, **options
        )
        if geometry.kernel_size < 1 or geometry.stride < 1 or not geometry.dilations:
            raise ValueError(
                f"kernel_size={geometry.kernel_size}, stride={geometry.stride}, dilations="
                f"{geometry.dilations}: expected a kernel and a stride of at least 1 and a dilation"
            )
        expected = tuple(geometry._places_along(side) for side in (height, width))
        if offsets.shape[1:3] != expected:
            raise ValueError(
                f"offsets has shape {offsets.shape}, for {offsets.shape[1:3]} places: expected "
                f"{expected} for the map of value {value.shape}, with kernel_size="
                f"{geometry.kernel_size}, stride={geometry.stride}, padding={geometry.padding} and "
                f"dilations={geometry.dilations}"
            )
        shape = (batch, *offsets.shape[1:3], groups, geometry.points)
        for name, array, wanted in (("offsets", offsets, (*shape, 2)), ("mask", mask, shape)):
            if array.shape != wanted or not jnp.issubdtype(array.dtype, jnp.floating):
                raise ValueError(
                    f"{name} is {array.dtype.name}{list(array.shape)}: expected floating point "
                    f"{list(wanted)}, to fit value {list(value.shape)} and the "
                    f"{geometry.points} points of kernel_size={geometry.kernel_size} with "
                    f"remove_center={geometry.remove_center}"
                )
        return geometry

    @property
    def points(self) -> int:
        return self.kernel_size**2 - self.remove_center

    @property
    def places(self) -> int:
        """Places of the result."""
        return self.out_height * self.out_width

    def _places_along(self, side: int) -> int:
        """As of a convolution with this kernel; without padding its centre stays on the map."""
        if self.padding is None:
            return -(-side // self.stride)
        spread = max(self.dilations) * (self.kernel_size - 1)
        return (side + 2 * self.padding - spread - 1) // self.stride + 1

    def grid(self) -> np.ndarray:
        """Points of each group without offsets, from their centre; [G, P, 2]."""
        steps = np.arange(self.kernel_size)
        steps = np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1).reshape(-1, 2)
        if self.remove_center:
            steps = np.delete(steps, len(steps) // 2, axis=0)
        return self._dilation * steps - self._reach

    def centers(self) -> np.ndarray:
        """The centre of each place on the map, (x, y); [Ho, Wo, G, 2]."""
        x, y = np.meshgrid(np.arange(self.out_width), np.arange(self.out_height))
        centers = self.stride * np.stack([x, y], axis=-1)[:, :, None]
        moved = self._reach[:, 0] - self.padding if self.padding is not None else np.zeros((1, 1))
        return centers + np.broadcast_to(moved, (self.groups, 1))[None, None]

    @property
    def _dilation(self) -> np.ndarray:
        return np.resize(self.dilations, self.groups)[:, None, None]  # resize repeats

    @property
    def _reach(self) -> np.ndarray:
        """From a kernel's first point to its centre; [G, 1, 1]."""
        return self._dilation * (self.kernel_size - 1) // 2
