"""Reading the files that PyTorch weights are released in, without running anything they contain."""

import argparse
import os
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from hybrid_flax.errors import InputError

# Where training scripts put the weights, in the order in which we look.
_ENTRIES = ("state_dict", "model", "state_dict_ema", "model_ema")


def load_checkpoint(path: str | os.PathLike, *, entry: str | None = None) -> dict[str, np.ndarray]:
    """Reads a released checkpoint into {key: array}.

    Takes PyTorch files (`.pth`, `.pth.tar`, `.pt`, zip or legacy format) and safetensors; the
    content decides, not the file's name. The `module.` prefix of wrapped models is removed.

    Args:
      path: the file.
      entry: which entry of a training checkpoint holds the weights. Default: the first there of
        `state_dict`, `model`, `state_dict_ema`, `model_ema`, else the file itself. Where a file has
        raw and averaged weights, the published accuracy may belong to either: for GC ViT the
        authors' evaluation takes `state_dict` unless told otherwise.

    Returns:
      Arrays in the file's dtypes (bfloat16 as `ml_dtypes.bfloat16`) and PyTorch's layouts.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not a checkpoint, damaged, or a file whose loading would run code; says which.
    """
    path = os.fspath(path)
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder; expected one checkpoint file (.pth, .safetensors)")
    with open(path, "rb") as file:
        head = file.read(64)
    if head.startswith(b"PK\x03\x04"):
        _check_zip(path)
        content = _torch_load(path, mmap=True)
    elif head[:1] == b"\x80":  # a bare pickle: PyTorch before 1.6
        content = _torch_load(path, mmap=False)
    elif head[8:9] == b"{":
        content = _load_safetensors(path)
    else:
        raise InputError(
            f"{path} is not a PyTorch or safetensors checkpoint: {_describe(path, head)}. "
            "Download it again from the model's release page"
        )
    weights = _select(content, entry, path)
    if weights and all(key.startswith("module.") for key in weights):
        weights = {key.removeprefix("module."): value for key, value in weights.items()}
    return {key: _to_numpy(value, key, path) for key, value in weights.items()}


def _describe(path: str, head: bytes) -> str:
    if not head:
        return "it is empty"
    start = head.lstrip().lower()
    if start.startswith((b"<!doctype", b"<html")):
        return "it is a web page, probably a download page that was saved instead of the file"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, not the file itself"
    return f"it has {os.path.getsize(path)} bytes and begins with {head[:24]!r}"


def _check_zip(path: str):
    """PyTorch stores its tensors uncompressed, with checksums: anything else is refused unread."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            packed = [m.filename for m in members if m.compress_type != zipfile.ZIP_STORED]
            if packed:
                raise InputError(
                    f"{path}: the archive member {packed[0]!r} is compressed, which PyTorch never "
                    "does; unpacking it could fill the memory, so the file is refused"
                )
            if sum(m.file_size for m in members) > os.path.getsize(path):
                raise InputError(f"{path}: the archive claims to hold more than its own size")
            if not any(m.filename.endswith("data.pkl") for m in members):
                raise InputError(f"{path} is a zip archive, but not one that torch.save wrote")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError) as error:
        raise InputError(f"{path} is damaged or incomplete ({error}); download it again") from error
    if damaged:
        raise InputError(f"{path} is damaged: {damaged!r} fails its checksum; download it again")


def _torch_load(path: str, *, mmap: bool) -> Any:
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"reading {path} needs PyTorch (its CPU build is enough); safetensors files do not"
        ) from error
    import pickle

    try:
        # Training scripts store their parsed arguments; a Namespace is data and runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        reason = str(error).split("WeightsUnpickler error:")[-1].strip()
        if "Unsupported operand" in reason:
            raise InputError(f"{path} is damaged or not from PyTorch: {reason}") from error
        reason = next((line for line in reason.splitlines() if "GLOBAL" in line), reason)
        raise InputError(
            f"{path} is refused: loading it would run pickled code ({reason.splitlines()[0]}). If "
            "you trust the file, open it with PyTorch on a machine you can lose and save only the "
            'weights again: torch.save({"state_dict": model.state_dict()}, "weights.pth")'
        ) from error
    except Exception as error:  # torch raises RuntimeError, EOFError, KeyError, … on damage
        raise InputError(f"{path} cannot be read as a PyTorch checkpoint: {error}") from error


def _load_safetensors(path: str) -> dict[str, Any]:
    import safetensors

    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {key: file.get_tensor(key) for key in file.keys()}
    except (safetensors.SafetensorError, AttributeError, TypeError) as error:  # or its dtype
        raise InputError(
            f"{path} is damaged or not a safetensors file ({error}); download it again"
        ) from error


def _select(content: Any, entry: str | None, path: str) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise InputError(f"{path} holds a {type(content).__name__}, not a dictionary with weights")
    if entry is not None:
        if not isinstance(content.get(entry), Mapping):
            raise InputError(
                f"{path} has no entry {entry!r} with weights; it has {', '.join(map(str, content))}"
            )
        return content[entry]
    for name in _ENTRIES:
        if isinstance(content.get(name), Mapping):
            return content[name]
    if content and all(hasattr(value, "shape") for value in content.values()):
        return content
    raise InputError(
        f"{path} has no weights under any of {', '.join(_ENTRIES)}, nor is it a bare state_dict; "
        f"its entries are {', '.join(map(str, content)) or 'none'}. Name one with entry="
    )


def _to_numpy(value: Any, key: str, path: str) -> np.ndarray:
    if type(value).__module__.split(".")[0] != "torch":
        if not hasattr(value, "shape"):
            raise InputError(f"{path}: {key!r} is a {type(value).__name__}, not an array")
        return np.asarray(value)
    import torch

    if value.layout != torch.strided or value.is_quantized or value.is_meta:
        raise InputError(f"{path}: {key!r} is not a plain dense tensor")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise InputError(
            f"{path}: {key!r} claims shape {tuple(value.shape)}, more than the file holds for it"
        )
    value = value.detach()
    if value.dtype == torch.bfloat16:
        return value.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return value.numpy()
