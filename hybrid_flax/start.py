"""Where weights come from: the seed, an earlier run, or a released checkpoint fitted to the model.

Of several processes only the first reads the files.
"""

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from hybrid_flax.as_trained import as_trained, warn_of_other_normalisation
from hybrid_flax.build import Prepared, prepare
from hybrid_flax.data.identity import class_changes, class_names, has_no_names
from hybrid_flax.distributed.mesh import replicated
from hybrid_flax.distributed.processes import from_first, is_first
from hybrid_flax.distributed.transfer import broadcast_from_first, put
from hybrid_flax.errors import InputError
from hybrid_flax.models.registry import family_of
from hybrid_flax.run.checkpoint_files import Arrays, check_same
from hybrid_flax.run.saved_weights import load_weights
from hybrid_flax.settings import Settings, Tree
from hybrid_flax.weights import bridge
from hybrid_flax.weights.adapt import adapt
from hybrid_flax.weights.class_map import keep_named_classes, read_class_map, select_classes
from hybrid_flax.weights.paths import flatten, unflatten_like


def initial_weights(
    config: Settings,
    fresh: Callable[[], bridge.Weights],
    mesh: Mesh,
    classes: Sequence[str] | None = None,
) -> bridge.Weights:
    """Parameters and batch statistics before the first step, on the mesh.

    `config.init_from` is where they come from:
    - "": the seed;
    - a folder: the newest intact checkpoint of a run (averaged weights where it has them) or of
      what `python -m convert` wrote;
    - a file: a released PyTorch checkpoint of this model;
    - "pretrained": the one its authors published, downloaded if need be.

    `config.init_class_map` names a file that says which class of that checkpoint each class is, so
    that the classifier is kept. Otherwise it is kept by the names of the classes, where both have
    some in common, and left fresh if it is for another number of classes. Position tables of
    another image size are resized. All of it is printed.

    Args:
      fresh: makes the weights from the seed; can be traced.
      classes: names of the dataset's classes, by number, where it has them.

    Raises:
      InputError: no checkpoint there, or one of another architecture; the class map does not fit
        the checkpoint or the dataset.
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
    found = _fitted(config, like, classes) if is_first() else None
    from_first(f"read {config.init_from}", lambda: None)
    flat = broadcast_from_first(found, like)
    return put(unflatten_like(start, flat), replicated(mesh))


def _fitted(config: Settings, like: Arrays, classes: Sequence[str] | None) -> Arrays:
    """The weights that `config.init_from` names, by path, in the shapes of `like`."""
    weights, origin, meta = _load(config)
    warn_of_other_normalisation(config, meta)
    structure = family_of(config.model.name).model.structure
    if config.init_class_map:
        rows = read_class_map(config.init_class_map, config.model.num_classes)
        weights = select_classes(weights, rows, structure)
        print(f"the classifier keeps {len(rows)} classes by {config.init_class_map}")
    else:
        weights = keep_named_classes(weights, like, class_names(meta), classes, structure)
    return adapt(weights, like, origin, structure)


def _load(config: Settings) -> tuple[Arrays, str, dict[str, Any]]:
    """(weights by path, what to call them, what was recorded with them), and says so."""
    if config.init_from == "pretrained" or os.path.isfile(config.init_from):
        from convert.pretrained import released_weights

        file = None if config.init_from == "pretrained" else config.init_from
        weights, file = released_weights(config.model.name, file)
        whose = "released weights, " if config.init_from == "pretrained" else "weights of "
        print(f"starting from the {whose}{file}")
        return weights, str(file), {}
    saved = load_weights(config.init_from)
    origin = f"{config.init_from} ({saved.meta.get('model', 'a model')}, step {saved.step})"
    print(f"starting from the {'averaged ' if saved.averaged else ''}weights of {origin}")
    return saved.best, origin, saved.meta


class TrainedWeights(NamedTuple):
    """What a program needs to use the weights that a work directory holds."""

    prepared: Prepared
    step: int
    trained: bridge.Weights  # on the mesh
    averaged: bridge.Weights | None  # where the run kept an average

    @property
    def best(self) -> bridge.Weights:
        """The averaged ones, if there are any."""
        return self.averaged or self.trained


def open_trained(
    config: Tree | None, workdir: str, split: str, given: Collection[str] | None = None
) -> TrainedWeights:
    """Loads the newest intact weights of a run, or what `python -m convert` wrote, and a split.

    Validation images have the classes' numbers that the run recorded, by name. A training split
    numbers its own, and it is said if they are not the run's.

    Args:
      config, given: see `as_trained`.

    Raises:
      InputError: no checkpoint there, or one of another model than the config asks for; a setting
        or the dataset cannot be used; the images have classes that the weights know nothing of.
    """
    saved = load_weights(workdir) if is_first() else None
    step, meta, has_average = from_first(
        "read the checkpoint", lambda: saved and [saved.step, saved.meta, bool(saved.averaged)]
    )
    names = class_names(meta)
    settings = as_trained(config, meta, given)
    prepared = prepare(settings, split, names if split == "val" else None)
    _compare_classes(prepared, meta)
    template = bridge.get_weights(prepared.model)
    like = flatten(template)
    for arrays in (saved.trained, saved.averaged) if saved else ():
        if arrays:
            check_same(arrays, like, f"the checkpoint in {workdir}")

    def on_mesh(arrays: Arrays | None) -> bridge.Weights:
        tree = unflatten_like(template, broadcast_from_first(arrays, like))
        return put(tree, replicated(prepared.mesh))

    return TrainedWeights(
        prepared,
        step,
        on_mesh(saved.trained if saved else None),
        on_mesh(saved.averaged if saved else None) if has_average else None,
    )


def _compare_classes(prepared: Prepared, meta: Mapping[str, Any]) -> None:
    """Warns if the images' class numbers may mean other classes than the model's do."""
    ours, theirs = prepared.source.class_names, class_names(meta)
    count = prepared.config.model.num_classes
    if ours is None:
        return
    if theirs is not None and list(ours) != list(theirs):
        logging.warning(
            "the classes of the dataset are not those that the model was trained with: %s",
            class_changes(theirs, ours),
        )
    elif theirs is None and (len(ours) < count or has_no_names(meta)):
        logging.warning(
            "names of the model's %d classes are not recorded: the dataset's %d, in the order of "
            "their names, are taken for the first of them",
            count,
            len(ours),
        )
