"""The place where the steps of a run's checkpoints are kept: a local folder or object storage."""

import os
from contextlib import AbstractContextManager
from typing import Protocol

from etils import epath

from hybrid_flax.run.storage.bucket import is_bucket
from hybrid_flax.run.storage.bucket_steps import BucketSteps
from hybrid_flax.run.storage.folder_steps import FolderSteps


class Steps(Protocol):
    """The finished steps of a run's checkpoints; its `str` is their path or URL.

    Attributes:
      folder: the local folder in which a new step is written.
      kept_here: whether all steps are in it, or only the one that is written or read.
      elsewhere: what a user can do to have the folder on another disk.
    """

    folder: epath.Path
    kept_here: bool
    elsewhere: str

    def steps(self) -> list[int]:
        """Lists the finished ones, ascending."""
        ...

    def finish(self, step: int) -> None:
        """Takes over a step that was written into `folder`; OSError if that cannot be done."""
        ...

    def open(self, step: int) -> AbstractContextManager[epath.Path]:
        """Gives a local folder with the step in it."""
        ...

    def delete(self, step: int) -> None:
        """Deletes a step; that it cannot be deleted is a warning, and no reason to stop."""
        ...

    def set_aside(self, step: int) -> str:
        """Moves a step to `damaged/` beside the others; says where to."""
        ...

    def delete_unfinished(self) -> None:
        """Deletes what interrupted saves have left."""
        ...


def open_steps(directory: str | os.PathLike) -> Steps:
    """Opens the checkpoints in a local folder, which need not be there, or on object storage."""
    return BucketSteps(os.fspath(directory)) if is_bucket(directory) else FolderSteps(directory)
