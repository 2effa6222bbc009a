"""Where the weights of a new run come from: the seed, or an earlier checkpoint fitted to it."""

from typing import Any

import jax
import ml_collections
from flax import nnx
from jax.sharding import Mesh

from hybrid_flax import bridge
from hybrid_flax.checkpoints import load_weights
from hybrid_flax.config import build_model
from hybrid_flax.distributed.mesh import replicated
from hybrid_flax.fitting import fit


def initial_weights(config: ml_collections.ConfigDict, mesh: Mesh) -> dict[str, Any]:
    """Parameters and batch statistics before the first step, on the mesh.

    With `config.init_from` they are those of the newest intact checkpoint there (averaged ones
    where it has them). A classifier for another number of classes is left fresh, and position
    tables of another image size are resized; both are printed.

    Raises:
      InputError: no checkpoint there, or one of another architecture; every difference is listed.
    """

    def fresh():
        return bridge.get_weights(build_model(config, rngs=nnx.Rngs(config.seed)))

    start = jax.jit(fresh, out_shardings=replicated(mesh))()
    if not config.init_from:
        return start
    weights = load_weights(config.init_from)
    origin = f"{config.init_from} ({weights.meta['model']}, step {weights.step})"
    print(f"starting from the {'averaged ' if weights.averaged else ''}weights of {origin}")
    flat = fit(weights.averaged or weights.trained, bridge.flatten(start), origin)
    return jax.device_put(bridge.unflatten_like(start, flat), replicated(mesh))
