"""The folder that belongs to one training run: who may use it, and what it records.

`config.json`     every setting, as resolved
`classes.json`    names of the classes, by number
`parameters.txt`  every parameter with its shape
`versions.json`   packages, devices and commit of the latest start
`ledger.jsonl`    where the time went, over all starts: see `goodput.py`
`stall-0.txt`     what the watchdog said, by process
`metrics.jsonl`   one line per logged step or evaluation; also as TensorBoard events
`curves.png`      the same, drawn
`checkpoints/`    see `checkpoints.py`; damaged ones are moved to `damaged/`
"""

import contextlib
import fcntl
import json
import logging
import os
import platform
from collections.abc import Iterable
from typing import Any, TextIO

from hybrid_flax.errors import InputError
from hybrid_flax.run.storage.bucket import is_bucket
from hybrid_flax.run.storage.mirror import Mirror
from hybrid_flax.settings import FIELDS, Settings, from_saved, to_plain
from hybrid_flax.versions import versions


class Workdir:
    """Belongs to this process between entering and leaving: `with Workdir(path, config) as run:`

    Args:
      path: a local folder, made if it is not there, or one on object storage (`gs://…`): then the
        run writes to a temporary folder, which `push` copies; see `storage/`.
      config: the resolved settings.

    Raises (on entering, with nothing changed):
      InputError: the folder cannot be written, is in use, or holds a run with another config.
    """

    def __init__(self, path: str, config: Settings):
        self._mirror = Mirror(path) if is_bucket(path) else None
        self.name = path.rstrip("/") if self._mirror else os.path.abspath(path)
        self.path = self._mirror.folder if self._mirror else self.name
        self.checkpoints = os.path.join(self.name, "checkpoints")
        self.metrics = os.path.join(self.path, "metrics.jsonl")
        self.ledger = os.path.join(self.path, "ledger.jsonl")
        self.curves = os.path.join(self.path, "curves.png")
        self._config = config

    def __enter__(self) -> "Workdir":
        with contextlib.ExitStack() as stack:
            if self._mirror:
                stack.enter_context(self._mirror)
            self._check_writable()
            self._lock(stack.enter_context(open(os.path.join(self.path, ".lock"), "a+")))
            self._check_same_run()
            self._write_versions()
            self._held = stack.pop_all()
        return self

    def __exit__(self, *_):
        self._held.close()

    def push(self) -> None:
        """Copies what has changed to object storage, if the run is there.

        That it cannot be copied is no reason to stop: it is tried again.

        Raises:
          TrainingError: another run has taken the work directory over.
        """
        if self._mirror:
            try:
                self._mirror.push()
            except OSError as error:
                logging.warning("cannot write to %s: %s. Training goes on", self.name, error)

    def _check_writable(self):
        """Writes, renames and reads back, as the run will."""
        name, text = f".probe-{os.getpid()}", os.urandom(64).hex()
        probe = os.path.join(self.path, name)
        try:
            os.makedirs(self.path, exist_ok=True)
            self.write_text(name, text)
            with open(probe) as stream:
                found = stream.read()
            os.remove(probe)
        except OSError as error:
            raise InputError(
                f"cannot write to the work directory {self.path}: {error.strerror}. Choose another "
                "--workdir, or mend its permissions, quota or disk"
            ) from error
        if found != text:
            raise InputError(
                f"the work directory {self.path} does not give back what was written to it "
                f"({len(text)} characters, {len(found)} read). Choose another --workdir"
            )

    def _lock(self, file: TextIO):
        """Held until the file is closed, or this process ends in any way."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            raise InputError(
                f"another process ({file.read().strip()}) is training in {self.path}; wait for "
                "it, or choose another --workdir"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()

    def _check_same_run(self):
        file = os.path.join(self.path, "config.json")
        mine = to_plain(self._config)
        if not self._has_checkpoints():
            pass  # whatever was begun here left nothing that could be continued
        elif os.path.exists(file):
            with open(file) as stream:
                theirs = json.load(stream)
            free = [field.name for field in FIELDS.values() if field.free]
            lines = [
                f"  {name}: the run has {then!r}, you gave {now!r}"
                for name, then, now in differences(from_saved(theirs), mine, free)
            ]
            if lines:
                raise InputError(
                    f"{self.name} holds another run. Choose another --workdir, or give the "
                    "settings of that run to continue it:\n" + "\n".join(lines)
                )
        else:
            raise InputError(
                f"{self.name} holds checkpoints but no training run (a converted model?). Choose "
                f"another --workdir; to start from its weights: --config.init_from={self.name}"
            )
        self.write_json("config.json", mine)

    def _has_checkpoints(self) -> bool:
        return self._mirror.has_checkpoints if self._mirror else os.path.isdir(self.checkpoints)

    def _write_versions(self):
        file = os.path.join(self.path, "versions.json")
        mine = versions()
        if os.path.exists(file):
            with open(file) as stream:
                before = json.load(stream)
            changed = [
                f"{name} {before.get(name)} → {version}"
                for name, version in mine.items()
                if before.get(name) != version
            ]
            if changed:
                logging.warning(
                    "since the last start of this run: %s. The result may differ in the last bits "
                    "from an uninterrupted run",
                    ", ".join(changed),
                )
        self.write_json("versions.json", mine)

    def write_text(self, name: str, text: str) -> None:
        """Writes a file that is either the old or the new one, whenever we are killed."""
        file = os.path.join(self.path, name)
        with open(f"{file}.tmp", "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(f"{file}.tmp", file)

    def write_json(self, name: str, content: Any) -> None:
        """The same, with anything JSON can hold."""
        self.write_text(name, json.dumps(content, indent=2) + "\n")


def differences(
    one: dict[str, Any], other: dict[str, Any], free: Iterable[str] = ()
) -> list[tuple[str, Any, Any]]:
    """(dotted name, value in one, value in the other) where two nested dicts differ.

    Names in `free` may differ; what one does not have is "nothing".
    """
    one, other = _dotted(one), _dotted(other)
    pairs = {
        name: (one.get(name, "nothing"), other.get(name, "nothing"))
        for name in sorted((one.keys() | other.keys()) - set(free))
    }
    return [(name, *pair) for name, pair in pairs.items() if pair[0] != pair[1]]


def _dotted(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= _dotted(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat
