"""Where the weights of a new run come from: the seed, or an earlier checkpoint fitted to it."""

import os
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from hybrid_flax.build import build_model
from hybrid_flax.distributed.mesh import replicated
from hybrid_flax.distributed.processes import from_first
from hybrid_flax.distributed.transfer import broadcast_from_first, put
from hybrid_flax.errors import InputError
from hybrid_flax.models.registry import family_of
from hybrid_flax.run.saved_weights import load_weights
from hybrid_flax.settings import Settings
from hybrid_flax.weights import bridge
from hybrid_flax.weights.adapt import adapt
from hybrid_flax.weights.class_map import read_class_map, select_classes
from hybrid_flax.weights.paths import flatten, unflatten_like


def initial_weights(config: Settings, mesh: Mesh) -> dict[str, Any]:
    """Parameters and batch statistics before the first step, on the mesh.

    `config.init_from` is where they come from:
    - "": the seed;
    - a folder: the newest intact checkpoint of a run (averaged weights where it has them) or of
      what `python -m convert` wrote;
    - a file: a released PyTorch checkpoint of this model;
    - "pretrained": the one its authors published, downloaded if need be.

    `config.init_class_map` names a file that says which class of that checkpoint each class is, so
    that the classifier is kept. Otherwise a classifier for another number of classes is left fresh.
    Position tables of another image size are resized. All of it is printed. Of several processes
    only the first reads the files.

    Raises:
      InputError: no checkpoint there, or one of another architecture: every difference is listed;
        the class map does not fit the checkpoint or the dataset.
    """

    def fresh():
        return bridge.get_weights(build_model(config, rngs=nnx.Rngs(config.seed)))

    start = jax.jit(fresh, out_shardings=replicated(mesh))()
    if not config.init_from:
        if config.init_class_map:
            raise InputError(
                "--config.init_class_map needs a checkpoint to take the classes from: "
                "--config.init_from="
            )
        return start
    like, flat = flatten(start), None
    structure = family_of(config.model.name).model.structure

    def fitted() -> None:
        nonlocal flat
        weights, origin = _load(config)
        if config.init_class_map:
            rows = read_class_map(config.init_class_map, config.model.num_classes)
            weights = select_classes(weights, rows, structure)
            print(f"the classifier keeps {len(rows)} classes by {config.init_class_map}")
        flat = adapt(weights, like, origin, structure)

    from_first(f"read {config.init_from}", fitted)
    flat = broadcast_from_first(flat, like)
    return put(unflatten_like(start, flat), replicated(mesh))


def _load(config: Settings) -> tuple[dict[str, Any], str]:
    """(weights by path, what to call them), and says so."""
    if config.init_from == "pretrained" or os.path.isfile(config.init_from):
        from convert.pretrained import released_weights

        file = None if config.init_from == "pretrained" else config.init_from
        weights, file = released_weights(config.model.name, file)
        print(f"starting from the released weights of {file}")
        return weights, str(file)
    saved = load_weights(config.init_from)
    origin = f"{config.init_from} ({saved.meta['model']}, step {saved.step})"
    print(f"starting from the {'averaged ' if saved.averaged else ''}weights of {origin}")
    return saved.averaged or saved.trained, origin
