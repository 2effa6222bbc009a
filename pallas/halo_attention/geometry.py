"""A kernel's knowledge of its arguments, and their checks."""

import dataclasses

from pallas.window_attention.geometry import check_map, expect


@dataclasses.dataclass(frozen=True)
class Halo:
    """All that a kernel for `halo_attention` must know beforehand, but for the batch."""

    height: int
    width: int
    heads: int
    dim: int
    block: int
    halo: int
    dtype: str

    @property
    def window(self) -> int:
        """Keys along each side of a neighbourhood."""
        return self.block + 2 * self.halo

    @classmethod
    def of(cls, qkv, row_table, column_table, block, halo) -> "Halo":
        """Checks the arguments; raises ValueError naming the one that does not fit."""
        height, width, heads, dim = check_map(qkv, 3)
        if block < 1 or height % block or width % block:
            raise ValueError(
                f"block={block} does not divide the map of qkv {qkv.shape}. Pad the map before the "
                "projection, as the models do"
            )
        if halo < 0:
            raise ValueError(f"halo={halo}: expected 0 or more places")
        for name, table in (("row_table", row_table), ("column_table", column_table)):
            expect(name, table, (2 * (block + 2 * halo) - 1, dim), "float32")
        return cls(height, width, heads, dim, block, halo, qkv.dtype.name)
