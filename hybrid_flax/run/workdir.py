"""The folder that belongs to one training run: who may use it, and what it records.

`config.json`     every setting, as resolved
`classes.json`    names of the classes, by number
`parameters.txt`  every parameter with its shape
`versions.json`   packages, devices and commit of the latest start
`ledger.jsonl`    where the time went, over all starts: see `goodput.py`
`stall-0.txt`     what the watchdog said, by process
`metrics.jsonl`   one line per logged step or evaluation; also as TensorBoard events
`curves.png`      the same, drawn
`compiled/`       see `compilation_cache.py`
`checkpoints/`    see `checkpoints.py`; damaged ones are moved to `damaged/`
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import platform
from collections.abc import Iterable
from typing import Any

import jax

from hybrid_flax.errors import InputError
from hybrid_flax.run import files
from hybrid_flax.run.goodput import read_ledger
from hybrid_flax.run.storage.bucket import is_bucket
from hybrid_flax.run.storage.mirror import Mirror
from hybrid_flax.run.storage.steps import open_steps
from hybrid_flax.settings import FIELDS, Settings, from_saved, to_plain
from hybrid_flax.text_files import read_json
from hybrid_flax.versions import versions


class Workdir:
    """Belongs to this process between entering and leaving: `with Workdir(path, config) as run:`

    Args:
      path: a local folder, made if it is not there, or one on object storage (`gs://…`): then the
        run writes to a temporary folder, which `push` copies; see `storage/`.
      config: the resolved settings.

    Raises (on entering, with nothing changed; for a name that is none, before):
      InputError: the folder cannot be written, is in use, or holds a run with another config.
    """

    def __init__(self, path: str, config: Settings):
        _check_text(path)
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
            try:
                self._lock(stack)
                self._check_same_run()
                self._write_versions()
                # Held open, so that no other folder can have its number.
                self._folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, self._folder)
            except OSError as error:
                raise InputError(
                    f"cannot use the work directory {self.name}: {files.explain(error)}. Mend it, "
                    "or choose another --workdir"
                ) from error
            self._held = stack.pop_all()
        return self

    def __exit__(self, *_):
        self._held.close()

    def check_there(self) -> None:
        """Raises OSError if the folder was moved or removed: a new one would be half a run."""
        if not os.path.samestat(os.stat(self.path), os.fstat(self._folder)):
            raise FileNotFoundError(errno.ENOENT, "it is another folder now", self.path)

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
            with open(probe, encoding="utf-8") as stream:
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

    def _lock(self, stack: contextlib.ExitStack):
        """Held until the stack is closed, or this process ends in any way."""
        descriptor = files.open_regular(os.path.join(self.path, ".lock"), os.O_RDWR | os.O_CREAT)
        stack.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            whose = os.read(descriptor, 200).decode(errors="replace").strip()
            raise InputError(
                f"another process ({whose}) is training in {self.path}; wait for it, or choose "
                "another --workdir"
            ) from error
        except OSError as error:  # some network file systems have none
            logging.warning(
                "%s: this file system has no locks (%s). See to it yourself that no other process "
                "trains here",
                self.path,
                error.strerror,
            )
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()}\n".encode())

    def _check_same_run(self):
        file = os.path.join(self.path, "config.json")
        mine = to_plain(self._config)
        if not self._has_checkpoints():
            pass  # whatever was begun here left nothing that could be continued
        elif os.path.lexists(file):
            free = [field.name for field in FIELDS.values() if field.free]
            lines = [
                f"  {name}: the run has {then!r}, you gave {now!r}"
                for name, then, now in differences(self._saved_config(file), mine, free)
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
        self._check_not_finished()
        self.write_json("config.json", mine)

    def _saved_config(self, file: str) -> dict[str, Any]:
        try:
            saved = read_json(file)
            if not isinstance(saved, dict):
                raise InputError(f"it holds a {type(saved).__name__}, not settings by name")
            return from_saved(saved)
        except (InputError, AttributeError, TypeError) as error:
            raise InputError(
                f"{self.name}/config.json is damaged: {error}. It says which run this is: restore "
                "it from a copy, or choose another --workdir; to start from the weights of this "
                f"run: --config.init_from={self.name}"
            ) from error

    def _check_not_finished(self):
        """A finished run whose checkpoints are gone would train, and be recorded, anew."""
        if self._has_checkpoints() and open_steps(self.checkpoints).steps():
            return
        lines = read_ledger(self.ledger)
        if lines and lines[-1].get("finished") is True:
            raise InputError(
                f"{self.name} holds the records of a run that was finished at step "
                f"{lines[-1]['step']}, but none of its checkpoints: training would write over "
                "them. Choose another --workdir, or move metrics.jsonl and ledger.jsonl away"
            )

    def _has_checkpoints(self) -> bool:
        return self._mirror.has_checkpoints if self._mirror else os.path.isdir(self.checkpoints)

    def _write_versions(self):
        file = os.path.join(self.path, "versions.json")
        mine = versions()
        if os.path.lexists(file):
            try:
                before = read_json(file)
                if not isinstance(before, dict):
                    raise InputError(f"it holds a {type(before).__name__}, not versions by name")
            except InputError as error:
                logging.warning(
                    "%s/versions.json is damaged: %s. What the last start of this run used is not "
                    "known; it is written anew",
                    self.name,
                    error,
                )
                before = mine
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
        """Writes a file that is either the old or the new one, whenever we are killed.

        Raises OSError, also for what is no file of its own: nothing goes through links.
        """
        files.replace_text(os.path.join(self.path, name), text)

    def write_json(self, name: str, content: Any) -> None:
        """The same, with anything JSON can hold."""
        self.write_text(name, json.dumps(content, indent=2) + "\n")


def _check_text(path: str) -> None:
    """Checkpoints are written by libraries that know file names as UTF-8 only."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"--workdir={path!a}: its name cannot be written as UTF-8. Choose another; if it "
            "looks right in this terminal, set PYTHONUTF8=1"
        ) from error


def stall_file(workdir: str) -> str | None:
    """The file of this process for the watchdog's last words; None on object storage."""
    name = f"stall-{jax.process_index()}.txt"
    return None if is_bucket(workdir) else os.path.join(workdir, name)


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
