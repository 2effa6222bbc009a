"""The steps of a run's checkpoints in a local folder."""

import contextlib
import itertools
import logging
import os
import re
from collections.abc import Iterator

from etils import epath

from hybrid_flax.errors import InputError
from hybrid_flax.run.storage.parts import PARTS, step_of

# What interrupted saves and deletions leave: Orbax's, and ours. All else is somebody's.
_UNFINISHED = re.compile(r"\d+\.(orbax-checkpoint-tmp.*|probe|deleted)")


class FolderSteps:
    """See `Steps`. Orbax renames a step when it is finished."""

    kept_here = True
    elsewhere = "choose another --workdir"

    def __init__(self, folder: str | os.PathLike):
        self.folder = epath.Path(os.path.abspath(folder))  # Orbax reads from no other

    def __str__(self) -> str:
        return str(self.folder)

    def steps(self) -> list[int]:
        """Also those that lack a part: they are damaged."""
        try:
            with os.scandir(self.folder) as entries:
                numbered = [entry.name for entry in entries if entry.is_dir()]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise InputError(
                f"cannot read {self.folder}: {error.strerror}. Mend its permissions or disk"
            ) from error
        found = {step_of(name): name for name in numbered}
        return sorted(
            step
            for step, name in found.items()
            if step is not None and any((self.folder / name / part).exists() for part in PARTS)
        )

    def finish(self, step: int) -> None:
        pass  # it is there

    @contextlib.contextmanager
    def open(self, step: int) -> Iterator[epath.Path]:
        folder = self.folder / str(step)
        for path, _, names in os.walk(folder):
            for file in (path, *(os.path.join(path, name) for name in names)):
                if os.path.exists(file) and not os.access(file, os.R_OK):
                    raise InputError(
                        f"{file} may not be read. That says nothing about the checkpoint: ask its "
                        "owner for permission, or copy the run"
                    )
        yield folder

    def delete(self, step: int) -> None:
        path = self.folder / str(step)
        with _warned(path):
            # What is half deleted must not pass for a checkpoint.
            path = path.rename(path.with_name(f"{step}.deleted"))
            with _warned(path):
                path.rmtree()

    def set_aside(self, step: int) -> str:
        damaged = self.folder.parent / "damaged"
        names = itertools.chain([str(step)], (f"{step}-{i}" for i in itertools.count(2)))
        target = next(damaged / name for name in names if not (damaged / name).exists())
        try:
            damaged.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(target)
        except OSError as error:
            raise InputError(
                f"cannot move the damaged checkpoint {self.folder}/{step} to {target}: "
                f"{error.strerror}. Move it away by hand, and start again"
            ) from error
        return str(target)

    def delete_unfinished(self) -> None:
        if self.folder.exists():
            for path in self.folder.iterdir():
                if _UNFINISHED.fullmatch(path.name):
                    with _warned(path):
                        path.rmtree()


@contextlib.contextmanager
def _warned(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        logging.warning("cannot delete %s: %s. Training goes on; delete it by hand", path, error)
