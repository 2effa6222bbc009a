"""Where the parameters of a new run come from: the seed, or an earlier checkpoint fitted to it."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx
from jax.sharding import Mesh

from hybrid_flax import bridge
from hybrid_flax.checkpoints import load_weights
from hybrid_flax.config import build_model
from hybrid_flax.distributed.mesh import replicated
from hybrid_flax.errors import InputError
from hybrid_flax.layers import resize_relative_position_bias


def initial_params(config: ml_collections.ConfigDict, mesh: Mesh) -> dict[str, Any]:
    """Parameters before the first step, on the mesh.

    With `config.init_from` they are those of the newest intact checkpoint there (averaged ones
    where it has them). A classifier for another number of classes is left fresh, and position
    tables of another image size are resized; both are printed.

    Raises:
      InputError: no checkpoint there, or one of another architecture; every difference is listed.
    """

    def fresh():
        return bridge.get_params(build_model(config, rngs=nnx.Rngs(config.seed)))

    params = jax.jit(fresh, out_shardings=replicated(mesh))()
    if not config.init_from:
        return params
    weights = load_weights(config.init_from)
    origin = f"{config.init_from} ({weights.meta['model']}, step {weights.step})"
    print(f"starting from the {'averaged ' if weights.ema else ''}weights of {origin}")
    flat = _fit(weights.ema or weights.params, bridge.flatten(params), origin)
    return jax.device_put(bridge.unflatten_like(params, flat), replicated(mesh))


def _fit(loaded: dict[str, Any], fresh: dict[str, Any], origin: str) -> dict[str, Any]:
    fitted, resized, problems = {}, [], []
    for path, leaf in fresh.items():
        array = loaded.get(path)
        if array is None:
            problems.append(f"{path}: not in the checkpoint, this model {leaf.shape}")
        elif array.shape == leaf.shape:
            fitted[path] = array
        elif path.startswith("head/"):
            fitted[path] = leaf
            if path.endswith("bias"):
                print(
                    f"the classifier for {array.shape[0]} classes is replaced by a fresh one for "
                    f"{leaf.shape[0]}"
                )
        elif path.endswith("/position_bias") and array.shape[1] == leaf.shape[1]:
            window = (round(leaf.shape[0] ** 0.5) + 1) // 2
            fitted[path] = resize_relative_position_bias(jnp.asarray(array), window)
            resized.append(path)
        else:
            problems.append(f"{path}: checkpoint {array.shape}, this model {leaf.shape}")
    problems += [f"{path}: only in the checkpoint" for path in loaded if path not in fresh]
    if problems:
        raise InputError(
            f"the weights of {origin} are not of this model; nothing was loaded. Give the same "
            "--config.model.name and overrides\n  " + "\n  ".join(problems)
        )
    if resized:
        print(f"{len(resized)} relative position tables are resized to this image size (bicubic)")
    return fitted
