"""Tensors and arrays of a checkpoint as NumPy arrays, or a refusal that names the key."""

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from convert.pickles import Array
from hybrid_flax.errors import InputError


def is_array(value: Any) -> bool:
    """Whether a value of a checkpoint is a tensor or an array, and not a number beside them."""
    return isinstance(value, Array) or hasattr(value, "layout") or hasattr(value, "__array__")


def to_arrays(state: Mapping[Any, Any], where: str) -> dict[str, np.ndarray]:
    """{key: array} of PyTorch tensors and NumPy arrays, in their dtypes.

    Args:
      where: what to call them in messages, such as the file.

    Raises:
      InputError: a key that is no text, or a tensor that has no dense array of numbers.
    """
    return {_key(key, where): _to_numpy(value, key, where) for key, value in state.items()}


def check_finite(weights: Mapping[str, Any], where: str) -> None:
    """Raises InputError, naming some, if there are weights that are NaN or infinite."""
    wrong = [path for path, array in weights.items() if not np.isfinite(array).all()]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InputError(f"{where}: not all values are finite in {', '.join(wrong[:3])}{more}")


def _key(key: Any, where: str) -> str:
    if not isinstance(key, str):
        raise InputError(
            f"{where}: the key {shorten(repr(key))} is a {type(key).__name__}; keys of weights are "
            "text, such as 'head.weight'"
        )
    return key


def _to_numpy(value: Any, key: Any, where: str) -> np.ndarray:
    try:
        if isinstance(value, Array):
            return value.read()
        if type(value).__module__.split(".")[0] != "torch":
            return np.asarray(value)
        return _tensor_to_numpy(value)
    except Exception as error:  # torch and NumPy raise a dozen kinds
        raise InputError(
            f"{where}: {shorten(repr(key))} cannot be used as weights: {shorten(str(error))}"
        ) from error


def _tensor_to_numpy(value: Any) -> np.ndarray:
    import torch

    if value.is_meta or value.is_nested or value.is_quantized or value.layout != torch.strided:
        kinds = {"is_meta": "meta", "is_nested": "nested", "is_quantized": "quantised"}
        kind = next((word for name, word in kinds.items() if getattr(value, name)), "sparse")
        raise InputError(f"it is a {kind} tensor, not a plain dense one")
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise InputError(f"it claims shape {tuple(value.shape)}, more than the file holds for it")
    value = value.detach().resolve_conj().resolve_neg()
    name = str(value.dtype).removeprefix("torch.")
    if name == "bfloat16" or name.startswith("float8_"):  # NumPy has them from ml_dtypes only
        bits = torch.uint16 if name == "bfloat16" else torch.uint8
        return value.view(bits).numpy().view(np.dtype(getattr(ml_dtypes, name)))
    return value.numpy()


def shorten(text: str, length: int = 200) -> str:
    """Text of a file for a message: not too much, and nothing that cannot be printed."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:length])
    return shown if len(text) <= length else f"{shown}…"
