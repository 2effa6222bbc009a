"""Weights, images and probes that can be rebuilt anywhere from a seed and a name.

The golden files hold what the official PyTorch models gave on these; nothing else is needed to
compare with them.
"""

import hashlib

import jax.numpy as jnp
import numpy as np

import hybrid_flax
from hybrid_flax.weights import bridge
from hybrid_flax.weights.paths import flatten, unflatten


def _uniform(tag: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 of mean 0 and variance 1, uniform: the top 24 bits of a Philox stream for `tag`."""
    seed = int.from_bytes(hashlib.sha256(tag.encode()).digest()[:8], "little")
    bits = np.random.Philox(key=seed).random_raw(max(int(np.prod(shape)), 1))[: int(np.prod(shape))]
    unit = (bits >> np.uint64(40)).astype(np.float32) / np.float32(2**24)
    return ((unit - np.float32(0.5)) * np.float32(np.sqrt(12.0))).reshape(shape)


def weights(seed: int, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The array of one state_dict entry: vectors near 0 (biases) or 1 (scales), else 1/√fan-in."""
    values = _uniform(f"{seed}:{key}", shape)
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "running_var":
        return np.float32(0.5) + np.abs(values)
    if leaf == "running_mean":
        return np.float32(0.1) * values
    if sum(length > 1 for length in shape) <= 1:
        return np.float32(0.1) * values + np.float32(0 if "bias" in leaf else 1)
    return values / np.float32(np.sqrt(np.prod(shape[1:])))


def images(seed: int, shape: tuple[int, int, int, int]) -> np.ndarray:
    """A batch [B, H, W, 3], as if normalised: white noise and a wave per image and channel."""
    batch, height, width, channels = shape
    y = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(0, 1, width, dtype=np.float32)[None, :]
    waves = [
        np.sin(np.float32(2 * np.pi) * ((i + 1) * y * 1.5 + (c + 1) * x))
        for i in range(batch)
        for c in range(channels)
    ]
    waves = np.stack(waves).astype(np.float32).reshape(batch, channels, height, width)
    return np.float32(0.7) * _uniform(f"image:{seed}", shape) + waves.transpose(0, 2, 3, 1)


def samples(array: np.ndarray, count: int = 64) -> np.ndarray:
    """Values at evenly spread places of the flattened array."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat[np.linspace(0, flat.size - 1, min(count, flat.size)).astype(np.int64)]


def projection(seed: int, key: str, gradient: np.ndarray) -> float:
    """⟨gradient, r⟩ with a random tensor r of unit variance that belongs to the key."""
    direction = _uniform(f"proj:{seed}:{key}", gradient.shape)
    return float(np.vdot(gradient.astype(np.float64), direction.astype(np.float64)))


def soft_labels(tag: str, shape: tuple[int, ...]) -> np.ndarray:
    """Targets that sum to 1 over axis 1, float32: a softmax of 3 times the tag's random numbers."""
    values = 3 * _uniform(tag, shape).astype(np.float64)
    exponentials = np.exp(values - values.max(axis=1, keepdims=True))
    return (exponentials / exponentials.sum(axis=1, keepdims=True)).astype(np.float32)


def model(name: str, seed: int = 0, **arguments):
    """A model with reproducible weights, without the time its own initialisation takes to compile.

    Layer scales, which start at 1e-5, are near 1 here, so that every part matters.
    """
    built = bridge.abstract(lambda: hybrid_flax.create_model(name, **arguments))
    filled = {}
    for path, leaf in flatten(bridge.get_weights(built)).items():
        name = path.partition("/")[2]
        if name.endswith("/var"):
            name = f"{name.removesuffix('var')}.running_var"
        array = np.zeros(leaf.shape) if name.endswith("/count") else weights(seed, name, leaf.shape)
        filled[path] = jnp.asarray(array, leaf.dtype)
    bridge.set_weights(built, unflatten(filled))
    return built
