"""The steps of a run's checkpoints in a local folder."""

import contextlib
import logging
import os
from collections.abc import Iterator

from etils import epath


class FolderSteps:
    """See `Steps`. Orbax renames a step when it is finished."""

    kept_here = True
    elsewhere = "choose another --workdir"

    def __init__(self, folder: str | os.PathLike):
        self.folder = epath.Path(os.path.abspath(folder))  # Orbax reads from no other

    def __str__(self) -> str:
        return str(self.folder)

    def steps(self) -> list[int]:
        if not self.folder.exists():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())

    def finish(self, step: int) -> None:
        pass  # it is there

    @contextlib.contextmanager
    def open(self, step: int) -> Iterator[epath.Path]:
        yield self.folder / str(step)

    def delete(self, step: int) -> None:
        path = self.folder / str(step)
        with _warned(path):
            # What is half deleted must not pass for a checkpoint.
            path = path.rename(path.with_name(f"{step}.deleted"))
            with _warned(path):
                path.rmtree()

    def set_aside(self, step: int) -> str:
        target = self.folder.parent / "damaged" / str(step)
        if target.exists():
            target.rmtree()
        target.parent.mkdir(parents=True, exist_ok=True)
        (self.folder / str(step)).rename(target)
        return str(target)

    def delete_unfinished(self) -> None:
        if self.folder.exists():
            for path in self.folder.iterdir():
                if not path.name.isdigit():
                    with _warned(path):
                        path.rmtree()


@contextlib.contextmanager
def _warned(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        logging.warning("cannot delete %s: %s. Training goes on; delete it by hand", path, error)
