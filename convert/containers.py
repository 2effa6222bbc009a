"""Reading the files that PyTorch weights are released in, without running anything they contain."""

import os
import re
import stat
import zipfile
from typing import Any

import numpy as np

from convert import pickles
from convert.entries import AVERAGED, find_weights
from convert.tensors import is_array, shorten, to_arrays
from hybrid_flax.errors import InputError

# Parts of keys that wrappers around some modules, or all, put in: torch.compile, FSDP, activation
# checkpointing.
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_PARALLEL = "module."  # DistributedDataParallel, and no name for others


def load_checkpoint(
    path: str | os.PathLike, *, entry: str | None = None, published: str | None = None
) -> dict[str, np.ndarray]:
    """Reads a released checkpoint into {key: array}.

    Takes PyTorch files (`.pth`, `.pth.tar`, `.pt`, zip or legacy format) and safetensors; the
    content decides, not the file's name. What wrappers put into keys is removed: `_orig_mod.`
    (torch.compile), `_fsdp_wrapped_module.` and `_checkpoint_wrapped_module.` anywhere, `module.`
    where all keys begin with it. What lies beside the weights is left out,
    and said where that may surprise.

    Args:
      path: the file.
      entry: which entry of a training checkpoint holds the weights: "model", "ema/module", "." for
        the file itself. Default: the first there of `published`, `state_dict`, `model`,
        `state_dict_ema`, `model_ema`, else the file itself or what else has weights in it. Where a
        file has raw and averaged weights, the published accuracy may belong to either: for GC ViT
        the authors' evaluation takes `state_dict` unless told otherwise.
      published: where the authors put the weights of a released file, if it is known
        (`model_info(name).weights_entry`).

    Returns:
      Arrays in the file's dtypes (bfloat16 as `ml_dtypes.bfloat16`) and PyTorch's layouts.

    Raises:
      FileNotFoundError: no such file.
      InputError: not a checkpoint, damaged, or a file that holds code; says which.
    """
    path = os.fspath(path)
    content = _read(path)
    found = find_weights(content, entry, published, path)
    if found.others:
        print(
            f"{path}: the weights are those of {found.entry}; there are others of "
            f"{shorten(', '.join(found.others[:5]))}, which --entry= would take"
        )
    elif AVERAGED.search(found.entry):
        print(f"{path}: the weights are averaged ones, {found.entry}")
    arrays = {key: value for key, value in found.weights.items() if is_array(value)}
    beside = [str(key) for key, value in found.weights.items() if not is_array(value)]
    if beside and arrays and found.entry != ".":
        print(f"{path}: left out, being no arrays: {shorten(', '.join(beside[:5]))}")
    return to_arrays(_unwrapped(arrays, path), path)


def _unwrapped(arrays: dict[Any, Any], path: str) -> dict[Any, Any]:
    """The arrays by the keys that they had without wrappers."""
    if not all(isinstance(key, str) for key in arrays):
        return arrays
    found = {_WRAPPERS.sub("", key): value for key, value in arrays.items()}
    if len(found) < len(arrays):
        raise InputError(
            f"{path} has some weights twice, with and without the parts of keys that "
            "torch.compile or FSDP put in"
        )
    while found and all(key.startswith(_PARALLEL) for key in found):
        found = {key.removeprefix(_PARALLEL): value for key, value in found.items()}
    return found


def _read(path: str) -> Any:
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:  # the latter: a zero byte in the name
        said = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read: {said}") from error
    if stat.S_ISDIR(mode):
        raise InputError(f"{path} is a folder; expected one checkpoint file (.pth, .safetensors)")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path} is a pipe or a device; expected a checkpoint file")
    try:
        with open(path, "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if head.startswith(b"PK\x03\x04"):
        _check_zip(path)
    elif head[8:9] == b"{":
        return _load_safetensors(path)
    elif head[:1] != b"\x80":  # a bare pickle: PyTorch before 1.6
        raise InputError(
            f"{path} is not a PyTorch or safetensors checkpoint: {describe(head, path)}. "
            "Download it again from the model's release page"
        )
    content, unread = pickles.load(path)
    if isinstance(content, pickles.StandIn):
        raise InputError(
            f"{path} holds an object of {content.stands_for}, which needs the code of that class. "
            'Where that is to be had: torch.save({"state_dict": torch.load(FILE, '
            'weights_only=False).state_dict()}, "weights.pth")'
        )
    if unread:
        print(
            f"{path}: nothing was run or read of the objects of {shorten(', '.join(unread[:3]))}"
            f"{f' and {len(unread) - 3} more kinds' if len(unread) > 3 else ''} in it"
        )
    return content


def describe(head: bytes, path: str | os.PathLike) -> str:
    """What a file is, by its first bytes, if it is not a checkpoint."""
    if not head:
        return "it is empty"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<head", b"<?xml", b"<!--")):
        return "it is a web page, probably a download page that was saved instead of the file"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself"
    for magic, kind in ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz")):
        if head.startswith(magic):
            return f"it is packed with {kind}; unpack it first"
    if head[257:262] == b"ustar":
        return "it is a tar archive; unpack it first"
    if head.startswith(b"\x89HDF"):
        return "it is an HDF5 file, of Keras perhaps"
    return f"it has {os.path.getsize(path)} bytes and begins with {head[:24]!r}"


def _check_zip(path: str):
    """PyTorch stores its tensors uncompressed, with checksums: anything else is refused unread."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            names = {m.filename.split("/")[-1] for m in members}
            if "constants.pkl" in names:
                raise InputError(
                    f"{path} is a TorchScript program, not weights. Make weights of it with "
                    'PyTorch: torch.save({"state_dict": torch.jit.load(FILE).state_dict()}, '
                    '"weights.pth")'
                )
            packed = [m.filename for m in members if m.compress_type != zipfile.ZIP_STORED]
            if packed:
                raise InputError(
                    f"{path}: the archive member {packed[0]!r} is compressed, which PyTorch never "
                    "does; unpacking it could fill the memory, so the file is refused"
                )
            if sum(m.file_size for m in members) > os.path.getsize(path):
                raise InputError(f"{path}: the archive claims to hold more than its own size")
            if "data.pkl" not in names:
                raise InputError(f"{path} is a zip archive, but not one that torch.save wrote")
            damaged = archive.testzip()
    except InputError:
        raise
    except Exception as error:  # BadZipFile, EOFError, NotImplementedError, struct.error, …
        raise InputError(f"{path} is damaged or incomplete ({error}); download it again") from error
    if damaged:
        raise InputError(f"{path} is damaged: {damaged!r} fails its checksum; download it again")


def _load_safetensors(path: str) -> dict[str, Any]:
    import safetensors

    arrays, key = {}, ""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            for key in file.keys():
                arrays[key] = file.get_tensor(key)
    except AttributeError as error:  # safetensors looks for it in NumPy
        raise InputError(
            f"{path}: {shorten(key)!r} is of a type that NumPy has not ({shorten(str(error))}). "
            "Save the weights as float32, float16 or bfloat16"
        ) from error
    except Exception as error:  # of its header, or a rank or shape that NumPy has not
        where = f" at {shorten(key)!r}" if key else ""
        raise InputError(
            f"{path} is damaged, or not a safetensors file that can be read here{where} "
            f"({shorten(str(error))}); download it again"
        ) from error
    return arrays
