"""Compiled programs, kept from one start to the next.

JAX keeps compiled programs by a key: a hash of the program, the compiler with its options, and the
devices. Its own store writes in place and believes what it reads, so that a flipped bit, or half a
file, may become another program. This one stands in its stead. An entry is a file that begins with
the SHA-256 of its key and content and appears by one rename, in a folder that nobody but its owner
may write to: compiled programs are code.

Whatever is wrong with an entry or with the folder makes programs compile as they do without it, and
is said.
"""

import contextlib
import functools
import hashlib
import logging
import os
import pathlib
import platform
import threading
from collections.abc import Iterator
from typing import Any

import jax
from jax._src import compilation_cache as jax_cache  # where it keeps its store has no public name
from jax._src.compilation_cache_interface import CacheInterface

from hybrid_flax.distributed.processes import everyone, from_first
from hybrid_flax.errors import InputError
from hybrid_flax.run.storage.bucket import is_bucket
from hybrid_flax.run.storage.entries import BucketEntries, FolderEntries
from hybrid_flax.run.tuning import Tuning

FOLDER = "compiled"  # in a work directory, and in the user's cache
OFF = "off"
HELP = (
    "Folder for compiled programs, on a disk or in a bucket; off: none. By default compiled/ in "
    "the work directory of a training run, otherwise in the user's cache."
)
# Shorter compilations cost more to look up; JAX's own limit is a second.
_SECONDS_WORTH_KEEPING = 0.1
_OPTIONS = _FOLDER, _SECONDS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
)
_HASH_BYTES = 32
_TUNING = "what XLA found by timing"


def user_folder() -> str:
    """The folder of this user and platform; OFF where the user has no home."""
    home = os.path.expanduser("~")
    usual = "Library/Caches" if platform.system() == "Darwin" else ".cache"
    top = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(top):  # as its specification wants
        top = os.path.join(home, usual)
    return os.path.join(top, "hybrid_flax", FOLDER) if os.path.isabs(top) else OFF


@contextlib.contextmanager
def cached(asked: str | None, default: str) -> Iterator[None]:
    """Around what compiles programs: those that a folder has are not compiled again.

    All processes of a run have to come here. Where not all of them see the folder it is not used.

    Args:
      asked: --compilation_cache: a folder, one on object storage, or OFF. None: what JAX was told
        by JAX_COMPILATION_CACHE_DIR, or `default`.

    Raises:
      InputError: it is no name of a folder.
    """
    before = {name: getattr(jax.config, name) for name in _OPTIONS}
    if asked is None and before[_FOLDER]:
        yield
        return
    if asked == "":
        raise InputError(
            f"--compilation_cache=: expected a folder for compiled programs, or {OFF} for none"
        )
    place = default if asked is None else asked
    store = None if place == OFF else _open(place if is_bucket(place) else os.path.abspath(place))
    tuning = store.tuning if store else None
    folder_of_xla = tuning.folder if tuning else None
    try:
        _give_to_jax(store, {_FOLDER: folder_of_xla, _SECONDS: _SECONDS_WORTH_KEEPING})
        yield
    finally:
        _give_to_jax(None, before)


def _give_to_jax(store: CacheInterface | None, options: dict[str, Any]) -> None:
    jax_cache.reset_cache()
    jax_cache._cache = store
    for name, value in options.items():
        jax.config.update(name, value)


def _open(place: str) -> "CompilationCache | None":
    """The store of a folder, if all processes see the same one.

    On GPUs the processes of a run compile together: one that finds a program would leave the
    others waiting.
    """
    if jax.process_count() == 1:
        return CompilationCache(place)
    token = os.urandom(8).hex()
    token = from_first("write compiled programs", lambda: _written(place, token))
    seen = (CompilationCache(place).get("token") or b"").decode() == token
    found = everyone("find compiled programs", str(seen))
    blind = [i for i, answer in enumerate(found) if answer != "True"]
    if blind and jax.process_index() == 0:
        logging.warning(
            "processes %s do not see the compiled programs in %s: all compile as without a cache",
            ", ".join(map(str, blind)),
            place,
        )
    return None if blind else CompilationCache(place)


def _written(place: str, token: str) -> str:
    CompilationCache(place).put("token", token.encode())
    return token


class CompilationCache(CacheInterface):
    """The compiled programs of a folder, as JAX asks for them.

    The first process makes the folder and writes; all read.

    Args:
      place: absolute path of a local folder, or one on object storage.
    """

    def __init__(self, place: str):
        self.place = place
        self._path = pathlib.Path(place)  # for JAX's log
        self._cannot: set[str] = set()  # "read", "write": said once, and not tried again
        self.tuning: Tuning | None = None
        with self._or_said("read", "write"):
            kind = BucketEntries if is_bucket(place) else FolderEntries
            self._entries = kind(place, make=jax.process_index() == 0)
            if jax.default_backend() == "gpu":
                self.tuning = Tuning(place)
                self.tuning.unpack(self.get(_TUNING))

    def get(self, key: str) -> bytes | None:
        """The intact entry of a key; None if there is none."""
        if "read" in self._cannot:
            return None
        with self._or_said("read"):
            entry = self._entries.read(_name(key))
            if entry is None:
                return None
            seal, value = entry[:_HASH_BYTES], entry[_HASH_BYTES:]
            if seal == _seal(key, value):
                return value
            logging.warning(
                "the compiled program %s in %s is damaged: it is compiled anew",
                key.rpartition("-")[0] or key,
                self.place,
            )
            self._entries.remove(_name(key))
        return None

    def put(self, key: str, value: bytes) -> None:
        """Keeps a program; at once, for nobody knows when this process will be killed."""
        if "write" in self._cannot:
            return
        with self._or_said("write"):
            self._entries.write(_name(key), _seal(key, value) + value)
            if self.tuning:
                found = self.tuning.pack()
                self._entries.write(_name(_TUNING), _seal(_TUNING, found) + found)

    @contextlib.contextmanager
    def _or_said(self, *actions: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._cannot.issuperset(actions):
                logging.warning(
                    "cannot %s compiled programs in %s: %s. Programs compile as without a cache",
                    " or ".join(actions),
                    self.place,
                    error.strerror or error,
                )
            self._cannot.update(actions)


def _seal(key: str, value: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\0" + value).digest()


def _name(key: str) -> str:
    """The file of a key: another for another JAX or, of CPUs, whose features programs use."""
    where = processor() if jax.default_backend() == "cpu" else platform.machine()
    return hashlib.sha256(f"{key} {jax.__version__} {where}".encode()).hexdigest()


@functools.cache
def processor() -> str:
    """Names this machine's kind of processor, with all that its programs may use: a hash."""
    words = f"{platform.system()} {platform.machine()}"
    with contextlib.suppress(OSError):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        words += next((x for x in lines if x.startswith(("flags", "Features"))), "")
    return f"{platform.machine()} {hashlib.sha256(words.encode()).hexdigest()[:8]}"


# ----------------------------------------------------------------------------------- hits, counted

_of_thread = threading.local()


def _count(event: str, **_: object) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _of_thread.hits = hits() + 1


jax.monitoring.register_event_listener(_count)


def hits() -> int:
    """How many programs this thread has found in the cache instead of compiling them."""
    return getattr(_of_thread, "hits", 0)
