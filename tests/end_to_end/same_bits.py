"""Comparing the last checkpoints of two runs."""

import os

from hybrid_flax.run.checkpoint_files import Restored
from hybrid_flax.run.checkpoints import Checkpoints


def final_arrays(workdir: str | os.PathLike) -> Restored:
    """The newest checkpoint: parameters, optimizer and average, by path."""
    restored = Checkpoints(os.path.join(workdir, "checkpoints")).restore()
    assert restored is not None
    return restored


def assert_same_bits(got: Restored, want: Restored) -> None:
    """The same step, the same paths, and not a bit between the arrays."""
    assert got.step == want.step
    assert got.arrays.keys() == want.arrays.keys()
    assert not [
        path for path, array in want.arrays.items() if got.arrays[path].tobytes() != array.tobytes()
    ]
