"""Where weights come from: the seed, an earlier run, or a released checkpoint fitted to the model.

Of several processes only the first reads the files.
"""

import os
from collections.abc import Callable
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from hybrid_flax.build import Prepared
from hybrid_flax.distributed.mesh import replicated
from hybrid_flax.distributed.processes import from_first, is_first
from hybrid_flax.distributed.transfer import broadcast_from_first, put
from hybrid_flax.errors import InputError
from hybrid_flax.models.registry import family_of
from hybrid_flax.run.checkpoint_files import Arrays, check_same
from hybrid_flax.run.saved_weights import load_weights
from hybrid_flax.settings import Settings
from hybrid_flax.weights import bridge
from hybrid_flax.weights.adapt import adapt
from hybrid_flax.weights.class_map import read_class_map, select_classes
from hybrid_flax.weights.paths import flatten, unflatten_like


def initial_weights(
    config: Settings, fresh: Callable[[], bridge.Weights], mesh: Mesh
) -> bridge.Weights:
    """Parameters and batch statistics before the first step, on the mesh.

    `config.init_from` is where they come from:
    - "": the seed;
    - a folder: the newest intact checkpoint of a run (averaged weights where it has them) or of
      what `python -m convert` wrote;
    - a file: a released PyTorch checkpoint of this model;
    - "pretrained": the one its authors published, downloaded if need be.

    `config.init_class_map` names a file that says which class of that checkpoint each class is, so
    that the classifier is kept. Otherwise a classifier for another number of classes is left fresh.
    Position tables of another image size are resized. All of it is printed.

    Args:
      fresh: makes the weights from the seed; can be traced.

    Raises:
      InputError: no checkpoint there, or one of another architecture: every difference is listed;
        the class map does not fit the checkpoint or the dataset.
    """
    start = jax.jit(fresh, out_shardings=replicated(mesh))()
    if not config.init_from:
        if config.init_class_map:
            raise InputError(
                "--config.init_class_map needs a checkpoint to take the classes from: "
                "--config.init_from="
            )
        return start
    like = flatten(start)
    found = _fitted(config, like) if is_first() else None
    from_first(f"read {config.init_from}", lambda: None)
    flat = broadcast_from_first(found, like)
    return put(unflatten_like(start, flat), replicated(mesh))


def _fitted(config: Settings, like: Arrays) -> Arrays:
    """The weights that `config.init_from` names, by path, in the shapes of `like`."""
    weights, origin = _load(config)
    structure = family_of(config.model.name).model.structure
    if config.init_class_map:
        rows = read_class_map(config.init_class_map, config.model.num_classes)
        weights = select_classes(weights, rows, structure)
        print(f"the classifier keeps {len(rows)} classes by {config.init_class_map}")
    return adapt(weights, like, origin, structure)


def _load(config: Settings) -> tuple[Arrays, str]:
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
    return saved.best, origin


class TrainedWeights(NamedTuple):
    """The weights that a work directory holds, on the mesh."""

    step: int
    trained: bridge.Weights
    averaged: bridge.Weights | None  # where the run kept an average

    @property
    def best(self) -> bridge.Weights:
        """The averaged ones, if there are any."""
        return self.averaged or self.trained


def trained_weights(prepared: Prepared, workdir: str) -> TrainedWeights:
    """Loads the newest intact weights of a run of this model, or what `python -m convert` wrote.

    Raises:
      InputError: no checkpoint there, or one of another model: every difference is listed.
    """
    template = bridge.get_weights(prepared.model)
    like = flatten(template)
    saved = load_weights(workdir) if is_first() else None
    for arrays in (saved.trained, saved.averaged) if saved else ():
        if arrays:
            check_same(arrays, like, f"the checkpoint in {workdir}")
    step, has_average = from_first(
        "read the checkpoint", lambda: saved and [saved.step, bool(saved.averaged)]
    )

    def on_mesh(arrays: Arrays | None) -> bridge.Weights:
        tree = unflatten_like(template, broadcast_from_first(arrays, like))
        return put(tree, replicated(prepared.mesh))

    return TrainedWeights(
        step,
        on_mesh(saved.trained if saved else None),
        on_mesh(saved.averaged if saved else None) if has_average else None,
    )
