"""Compiled programs, kept from one start to the next.

JAX keeps compiled programs in a folder. It does not check what it reads there, and writes in place:
a bit that flipped, or half a file, could become another program. So the folder that JAX is given is
a working copy of this machine. The store beside the run has every entry under a name that ends in
its SHA-256; an entry is copied out of it only if it agrees with that name, and into it by one
rename.

On GPUs the same folder keeps what XLA found by timing (autotuning), without which two starts may
choose other kernels, whose last bits differ. There the path of the copy belongs to JAX's key: it
follows from the store's, and is the same at every start.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import logging
import os
import pathlib
import platform
import re
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import TextIO

import jax

from hybrid_flax.run.storage.bucket import Bucket, files_in, is_bucket, scratch

FOLDER = "compiled"  # in a work directory, and in the user's cache
_LOCK = ".lock"
_LARGEST = 2**30  # bytes that a store may hold; the oldest entries go first
_SEALED = re.compile(r"(.+)\.([0-9a-f]{64})")
# Shorter ones cost more to look up than to compile; JAX's own limit is a second.
_SECONDS_WORTH_KEEPING = 0.1


@dataclasses.dataclass
class Compiled:
    """What making programs has cost: seconds, and how many came from the cache or were new."""

    trace: float = 0.0
    lower: float = 0.0
    compile: float = 0.0  # reading from the cache included
    cached: int = 0
    new: int = 0

    def __str__(self) -> str:
        seconds = self.trace + self.lower + self.compile
        how = f"new: tracing {self.trace:.1f} s, lowering {self.lower:.1f} s"
        return f"{seconds:.1f} s ({'from the cache' if self.cached and not self.new else how})"


class CompilationCache:
    """The compiled programs of a folder; `keep` adds those that this process has compiled since.

    Whatever is wrong with the folder makes programs compile as without it, and is said once.

    Args:
      place: a local folder, made for its owner alone, or one on object storage.
    """

    def __init__(self, place: str):
        self.place = os.path.join(place, machine())
        self._bucket = Bucket(self.place) if is_bucket(place) else None
        self._copy, self._lock = _working_copy(self.place)
        self._known: set[str] = set()
        self._broken = False
        with self._or_none("read"):
            damaged = self._read()
            if damaged:
                logging.warning(
                    "%d of the compiled programs in %s are damaged: compiled anew",
                    damaged,
                    self.place,
                )
        if not jax.process_index():  # what a killed start left, and nobody checked
            for name in set(files_in(self._copy)) - self._known - {_LOCK}:
                os.remove(os.path.join(self._copy, name))
        if jax.default_backend() != "gpu":
            jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
        jax.config.update("jax_compilation_cache_dir", self._copy)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", _SECONDS_WORTH_KEEPING)

    def keep(self) -> None:
        """Stores what was compiled since. No other thread may be compiling."""
        if self._broken or jax.process_index():
            return
        new = [name for name in files_in(self._copy) if name not in self._known | {_LOCK}]
        with self._or_none("write"):
            sealed = []
            for name in new:
                content = pathlib.Path(self._copy, name).read_bytes()
                sealed.append(self._store(name, content))
            if self._bucket and sealed:
                self._bucket.upload(self._copy, sealed)
                for name in sealed:
                    os.remove(os.path.join(self._copy, name))
            self._known.update(new)

    def _read(self) -> int:
        """Copies the intact entries to where JAX looks; how many were not intact."""
        if self._bucket:
            store = scratch()
            self._bucket.download(self._bucket.names(), store)
        else:
            store = self.place
            _make_private(store)
        self._make_room(store)
        damaged = 0
        for name in files_in(store):
            entry = _SEALED.fullmatch(name)
            content = pathlib.Path(store, name).read_bytes() if entry else b""
            if entry and hashlib.sha256(content).hexdigest() == entry[2]:
                _write(os.path.join(self._copy, entry[1]), content)
                self._known.add(entry[1])
            elif entry:
                damaged += 1
                self._drop(name)
        return damaged

    def _store(self, name: str, content: bytes) -> str:
        """Writes an entry under its sealed name, which it returns."""
        sealed = f"{name}.{hashlib.sha256(content).hexdigest()}"
        folder = self._copy if self._bucket else self.place
        _write(os.path.join(folder, sealed), content)
        return sealed

    def _drop(self, name: str) -> None:
        with contextlib.suppress(OSError):
            if self._bucket:
                self._bucket.delete([name])
            else:
                os.remove(os.path.join(self.place, name))

    def _make_room(self, store: str) -> None:
        """Deletes the oldest entries beyond the size that a store may have, and what kills left."""
        found = []
        for name in files_in(store):
            about = os.stat(os.path.join(store, name))
            if name.endswith(".tmp") and time.time() - about.st_mtime > 3600:
                self._drop(name)
            else:
                found.append((about.st_mtime, about.st_size, name))
        total = sum(size for _, size, _ in found)
        for _, size, name in sorted(found):
            if total <= _LARGEST:
                break
            self._drop(name)
            total -= size

    @contextlib.contextmanager
    def _or_none(self, action: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._broken = True
            logging.warning(
                "cannot %s compiled programs in %s: %s. Programs compile as without a cache",
                action,
                self.place,
                error.strerror or error,
            )


def _working_copy(place: str) -> tuple[str, TextIO | None]:
    """(the folder for JAX, open lock): the same at every start, but while it is in use."""
    name = hashlib.sha256(place.encode()).hexdigest()[:16]
    folder = os.path.join(tempfile.gettempdir(), f"hybrid_flax-{os.geteuid()}", name)
    try:
        for private in (os.path.dirname(folder), folder):
            _make_private(private)
        if jax.process_index():  # reads what the first process has
            return folder, None
        lock = open(os.path.join(folder, _LOCK), "w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return folder, lock
    except OSError:
        return scratch(), None


def _write(file: str, content: bytes) -> None:
    """Writes a file that is whole or not there."""
    os.makedirs(os.path.dirname(file), mode=0o700, exist_ok=True)
    part = f"{file}.{os.getpid()}.tmp"
    try:
        with open(part, "wb") as stream:
            stream.write(content)
            os.fsync(stream.fileno())
        os.replace(part, file)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(part)
        raise


def _make_private(folder: str) -> None:
    """Makes a folder for its owner alone. Compiled programs are code: nobody else may write them.

    Raises:
      OSError: it cannot be made, or others may write in it.
    """
    os.makedirs(folder, mode=0o700, exist_ok=True)
    about = os.lstat(folder)
    if not stat.S_ISDIR(about.st_mode):
        raise OSError("it is no folder")
    if about.st_uid != os.geteuid():
        raise OSError("it belongs to another user")
    if about.st_mode & 0o022:
        raise OSError("others may write in it; chmod go-w")


def machine() -> str:
    """What a compiled program may depend on and JAX's own key has not: the processor's features."""
    features = platform.processor()
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                features = line
                break
    words = f"{platform.machine()} {platform.system()} {features}"
    short = hashlib.sha256(words.encode()).hexdigest()[:8]
    return f"{platform.machine()}-{short}-jax-{jax.__version__}"


# ------------------------------------------------------------------------------------- accounting

_EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower",
    "/jax/core/compile/backend_compile_duration": "compile",
    "/jax/compilation_cache/cache_hits": "cached",
    "/jax/compilation_cache/cache_misses": "new",
}
_of_thread = threading.local()


def _count(event: str, amount: float = 1, **_: object) -> None:
    for counts in getattr(_of_thread, "open", ()):
        if event in _EVENTS:
            field = _EVENTS[event]
            setattr(counts, field, getattr(counts, field) + amount)


jax.monitoring.register_event_listener(_count)
jax.monitoring.register_event_duration_secs_listener(_count)


@contextlib.contextmanager
def counted() -> Iterator[Compiled]:
    """Counts what this thread compiles inside."""
    counts = Compiled()
    opened = _of_thread.__dict__.setdefault("open", [])
    opened.append(counts)
    try:
        yield counts
    finally:
        opened.remove(counts)
