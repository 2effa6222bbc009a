"""Reads what `torch.save` wrote, without running anything that the file names.

PyTorch's own reader for weights (`weights_only`) makes tensors and plain data, and refuses every
other name. Here each name that is data gets a stand-in, which takes whatever the file gives it and
does nothing, so that what lies beside the weights does not refuse them. Only NumPy's arrays are
read, since they can be weights.
"""

import _compat_pickle
import collections
import contextlib
import pickle
import pickletools
import sys
import warnings
import zipfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from hybrid_flax.errors import InputError

_TRIES = 20  # readings of a file, to learn which of its objects are dictionaries
_MOST_NAMES = 1000  # PyTorch's reader takes time with the square of their number
_LEGACY_PICKLES = 5  # magic number, version, machine, content, keys of the tensors

# What of Python's own library is data. Everything else of it is taken for code that a file wants
# to run: a checkpoint has no use for it.
_DATA_MODULES = {"argparse", "collections", "datetime", "decimal", "fractions", "pathlib", "uuid"}
_DATA = {
    "_codecs.encode",
    "array.array",
    "copyreg._reconstructor",
    "random.Random",
    "types.SimpleNamespace",
    *(f"builtins.{kind}" for kind in ("bool", "bytearray", "bytes", "complex", "dict", "float")),
    *(f"builtins.{kind}" for kind in ("frozenset", "int", "list", "object", "range", "set")),
    *(f"builtins.{kind}" for kind in ("slice", "str", "tuple", "Ellipsis", "NotImplemented")),
}
_PLAIN = sys.stdlib_module_names | {"numpy"}
_OURS = _PLAIN | {"torch"}  # whose data beside the weights is not worth a line


class StandIn:
    """Takes any arguments and any state, and does nothing."""

    stands_for = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Dictionary(StandIn):
    """Stands for kinds of dictionaries, which the file fills entry by entry."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return collections.OrderedDict()


class _List(StandIn):
    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return []


class _DType(StandIn):
    """NumPy's dtype, of numbers: the rest has no `code`."""

    def __init__(self, code: Any = None, *args: Any):
        self.code = code if isinstance(code, str) and code[:1] in tuple("biufc") else None

    def __setstate__(self, state: Any) -> None:
        if self.code and isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.code = state[1] + self.code.lstrip("<>=|")


class Array(StandIn):
    """NumPy's array, unread."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def read(self) -> np.ndarray:
        """The array; ValueError, or what NumPy raises, if it is not whole or not of numbers."""
        _, shape, dtype, by_columns, data = self.state
        if not isinstance(data, bytes) or not dtype.code:
            raise ValueError("it is not an array of numbers")
        flat = np.frombuffer(data, np.dtype(dtype.code))
        return flat.reshape(shape, order="F" if by_columns else "C")


class _NewArray(Array):
    """`numpy.core.multiarray._reconstruct`, which is given a class, a shape and a letter."""

    def __new__(cls, *args: Any) -> Any:
        return object.__new__(Array)


_KNOWN: dict[str, type[StandIn]] = {
    "collections.defaultdict": _Dictionary,
    "collections.deque": _List,
    "numpy.ndarray": Array,
    "numpy.dtype": _DType,
    "numpy.core.multiarray._reconstruct": _NewArray,
    "numpy._core.multiarray._reconstruct": _NewArray,
}


def load(path: str) -> tuple[Any, list[str]]:
    """What a PyTorch file holds, with stand-ins, and the names of the kinds that were not read.

    Args:
      path: of a file in the zip format or the one before PyTorch 1.6.

    Raises:
      InputError: damaged, it names code, or PyTorch is not installed.
    """
    try:
        import torch
    except ImportError as error:
        raise InputError(
            f"reading {path} needs PyTorch (its CPU build is enough), which cannot be imported "
            f"here ({error}); safetensors files do not need it"
        ) from error
    with open(path, "rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"  # as PyTorch decides it
    names = sorted(_names(path, is_zip))
    _refuse_code(path, names)
    stand_ins = {name: _stand_in(name, number) for number, name in enumerate(names)}
    tries = 0
    while True:
        safe: list[Any] = [(kind, name) for name, kind in stand_ins.items()]
        safe += [(kind, kind.__name__) for kind in (Array, _DType)]  # as what `_KNOWN` makes
        try:
            with torch.serialization.safe_globals(safe), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
            return content, [name for name in names if name.partition(".")[0] not in _OURS]
        except Exception as error:  # torch raises RuntimeError, EOFError, KeyError, … on damage
            filled = _filled(stand_ins, error)
            tries += 1
            if not filled or tries == _TRIES:
                unread = [name for name in names if name.partition(".")[0] not in _PLAIN]
                raise InputError(_explain(path, error, unread)) from error
            stand_ins[filled] = _List if "list" in str(error) else _Dictionary


def _filled(stand_ins: dict[str, type[StandIn]], error: Exception) -> str:
    """Which stand-in the file fills, by PyTorch's error: it is to be a dictionary, or a list."""
    if isinstance(error, pickle.UnpicklingError):
        for name, kind in stand_ins.items():
            if kind not in (_List, _Dictionary) and repr(kind) in str(error):
                return name
    return ""


def _stand_in(name: str, number: int) -> type[StandIn]:
    """One of its own for each name, so that an error of PyTorch tells which it is."""
    return _KNOWN.get(name) or type(f"kind_{number}", (StandIn,), {"stands_for": name})


def _refuse_code(path: str, names: list[str]) -> None:
    def is_data(name: str) -> bool:
        module = name.rpartition(".")[0]
        return name in _DATA or module.split(".")[0] in _DATA_MODULES

    ours = [name for name in names if name.partition(".")[0] in sys.stdlib_module_names]
    code = [name for name in ours if not is_data(name)]
    if code:
        raise InputError(
            f"{path} is refused: it holds pickled code beside its tensors ({_shown(code)}), which "
            "a checkpoint has no use for. If you trust the file, open it with PyTorch on a "
            "machine you can lose, content = torch.load(FILE, weights_only=False), and save only "
            'the weights in it: torch.save({"state_dict": content[ENTRY]}, "weights.pth")'
        )
    if len(names) > _MOST_NAMES:
        raise InputError(f"{path} is refused: it names {len(names):,} kinds of objects")


def _names(path: str, is_zip: bool) -> set[str]:
    """The classes and functions that a file names, "module.name", found without running it."""
    names: set[str] = set()
    try:
        with contextlib.ExitStack() as stack:
            if is_zip:
                archive = stack.enter_context(zipfile.ZipFile(path))
                members = [m for m in archive.namelist() if m.split("/")[-1] == "data.pkl"]
                streams = [stack.enter_context(archive.open(member)) for member in members]
            else:
                streams = [stack.enter_context(open(path, "rb"))] * _LEGACY_PICKLES
            for stream in streams:
                names.update(_names_in(stream))  # type: ignore[arg-type]  # they read alike
    except Exception:  # not a pickle, or damaged: torch.load says what is wrong
        pass
    return names


def _names_in(stream: BinaryIO) -> Iterator[str]:
    for opcode, argument, _ in pickletools.genops(stream):
        if opcode.name in ("GLOBAL", "INST"):
            module, _, name = str(argument).partition(" ")
            # Pickles for Python 2 have the old names, which PyTorch's reader translates, too.
            module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
            module = _compat_pickle.IMPORT_MAPPING.get(module, module)
            yield f"{module}.{name}"


def _explain(path: str, error: Exception, unread: list[str]) -> str:
    reason = str(error).split("WeightsUnpickler error:")[-1].strip() or type(error).__name__
    reason = reason.splitlines()[0][:200]
    kinds = f"; it names {_shown(unread)}" if unread else ""
    return (
        f"{path} cannot be read as a PyTorch checkpoint: it is damaged, or not what torch.save "
        f"writes of weights by default ({reason}{kinds}). Download it again; if it is yours, save "
        'only the weights: torch.save({"state_dict": model.state_dict()}, "weights.pth")'
    )


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(name[:80] for name in names[:3]) + more
