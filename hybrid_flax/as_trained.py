"""The settings of a program that uses trained weights: those that the weights were trained with.

A checkpoint has the settings of its run. They stand for the config's, so that nobody has to type
again what was given in training. What the command line gives wins, and is warned of where a model
sees otherwise than it did in training. The mesh is that of the machine, never the run's.
"""

import logging
from collections.abc import Collection, Mapping
from typing import Any

from hybrid_flax.build import checked
from hybrid_flax.errors import InputError
from hybrid_flax.settings import FIELDS, Settings, Tree, from_saved, replace, to_plain

# What a model has learned to expect of its input, and what it is.
NORMALISATION = ("dataset.mean", "dataset.std")
SEEN = (
    "model.name",
    "model.num_classes",
    "model.image_size",
    "model.dtype",
    "model.overrides",
    *NORMALISATION,
    "eval.crop_fraction",
    "eval.crop_mode",
    "eval.interpolation",
)
_USED = ("model", "dataset", "eval", "mesh", "watchdog_seconds")  # the rest is of training
_WHICH_IMAGES = ("dataset.path", "dataset.train_split", "dataset.val_split", "dataset.index")


def as_trained(
    config: Tree | None, meta: Mapping[str, Any], given: Collection[str] | None = None
) -> Settings:
    """The settings that weights were trained with, but for those that are given; says what differs.

    A dataset that is given by another name comes with the config's path and splits.

    Args:
      config: of the program; None: there is none but the run's.
      meta: of the checkpoint; what `python -m convert` wrote has name, classes and size of a model.
      given: names of the fields that the command line sets ("model.image_size"); None: all that
        the config has are meant as they are.

    Raises:
      InputError: a setting cannot be used, or there is no config at all.
    """
    trained = _recorded(meta)
    _warn_of_unused(given or ())
    if config is None:
        if "config" not in meta:
            raise InputError(
                "--config is missing: these weights are of no training run, whose settings would "
                "be known; to try: --config=configs/gcvit_b.py"
            )
        return checked(from_saved({**meta["config"], "mesh": {}}))
    asked = checked(config)
    if asked.model.num_classes == 0:  # it asks for what there is
        asked = replace(asked, {"model.num_classes": trained.get("model.num_classes", 0)})
    now = _by_name(to_plain(asked))
    differing = [
        name
        for name, value in trained.items()
        if value != now[name] and not name.startswith("mesh.")
    ]
    kept = [name for name in differing if _is_given(name, given)]
    if "dataset.name" in kept:
        kept += [name for name in differing if name in _WHICH_IMAGES and name not in kept]
    _warn_of(kept, trained, now)
    taken = {name: trained[name] for name in differing if name not in kept}
    _tell_of(taken, now)
    return replace(asked, taken) if taken else asked


def warn_of_other_normalisation(config: Settings, meta: Mapping[str, Any]) -> None:
    """Warns if a run starts from weights that were trained with another mean or deviation."""
    trained, now = _recorded(meta), _by_name(to_plain(config))
    _warn_of(
        [name for name in NORMALISATION if trained.get(name, now[name]) != now[name]], trained, now
    )


def _recorded(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint has of the settings it was made with, by dotted name."""
    if "config" in meta:
        return _by_name(from_saved(meta["config"]))
    model = {"name": "model", "num_classes": "num_classes", "image_size": "image_size"}
    return {f"model.{name}": meta[key] for name, key in model.items() if key in meta}


def _by_name(tree: Mapping[str, Any]) -> dict[str, Any]:
    """{dotted name: value} of all settings that a tree of plain values has."""
    found = {}
    for name in FIELDS:
        section, _, field = name.rpartition(".")
        values = tree.get(section, {}) if section else tree
        if field in values:
            found[name] = values[field]
    return found


def _is_given(name: str, given: Collection[str] | None) -> bool:
    return given is None or any(each == name or each.startswith(f"{name}.") for each in given)


def _warn_of(names: Collection[str], trained: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differing = [
        f"--config.{name}={now[name]!r} (trained with {trained[name]!r})"
        for name in SEEN
        if name in names
    ]
    if differing:
        logging.warning("not as the weights were trained: %s", ", ".join(differing))


def _warn_of_unused(given: Collection[str]) -> None:
    if unused := [name for name in given if name.partition(".")[0] not in _USED]:
        logging.warning(
            "%s: of no effect here, for only training reads it",
            ", ".join(f"--config.{name}" for name in unused),
        )


def _tell_of(taken: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Says which settings are the run's; what only training has needs no words."""
    said = [
        f"{name}={value!r} (the config has {now[name]!r})"
        for name, value in taken.items()
        if name in (*SEEN, "dataset.name", *_WHICH_IMAGES)
    ]
    if said:
        print(
            f"as the weights were trained: {', '.join(said)}. What is given as --config.FIELD= "
            "is used instead"
        )
