"""Builds what a config asks for: the model of a program, and what a run computes at every step."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from hybrid_flax import settings
from hybrid_flax.costs.flops import training_flops
from hybrid_flax.data.augmentation.policies import parse_policy
from hybrid_flax.data.identity import fingerprint
from hybrid_flax.data.sources import EncodedSource, Source, describe_files, source_of
from hybrid_flax.distributed.batch import batch_sharded, round_up
from hybrid_flax.distributed.mesh import make_mesh
from hybrid_flax.distributed.processes import from_first
from hybrid_flax.distributed.shardings import say_unused_rules, state_shardings
from hybrid_flax.errors import InputError
from hybrid_flax.layers import group_batch_norms
from hybrid_flax.models import registry
from hybrid_flax.models.backbone import Backbone
from hybrid_flax.models.structure import Structure
from hybrid_flax.run.compiling import CompiledOnce
from hybrid_flax.run.workdir import differences
from hybrid_flax.scan_choice import scans
from hybrid_flax.settings import Settings
from hybrid_flax.training.optimizers import found_in, make_optimizer
from hybrid_flax.training.schedules import make_schedule, peak_learning_rate
from hybrid_flax.training.step import (
    Shardings,
    State,
    make_eval_step,
    make_train_step,
    new_state,
    weights_of,
)
from hybrid_flax.versions import numerics, versions
from hybrid_flax.weights import bridge
from hybrid_flax.weights.functions import as_function, as_training_function
from hybrid_flax.weights.paths import flatten


class Prepared(NamedTuple):
    """The opening of programs that run a model."""

    config: Settings  # with the number of classes
    source: EncodedSource
    mesh: Mesh
    model: Backbone  # abstract


def open_split(config: settings.Tree, split: str) -> tuple[Settings, EncodedSource]:
    """Checks a config and opens a split, "train" or "val", of its dataset.

    Returns:
      (the settings, with the number of classes; the images of the split)

    Raises:
      InputError: a setting or the dataset cannot be used.
    """
    found = checked(config)
    source = source_of(found.dataset, split)
    return resolve_classes(found, source), source


def open_splits(config: Settings) -> tuple[Settings, EncodedSource, EncodedSource]:
    """Opens both splits of checked settings; the training split's class names number both.

    What they have is printed.

    Returns:
      (the settings, with the number of classes; the training images; the validation images)

    Raises:
      InputError: the dataset cannot be used, or the validation split has classes that the training
        split has not.
    """
    train = source_of(config.dataset, "train")
    found = resolve_classes(config, train)
    val = source_of(config.dataset, "val", classes=train.class_names)
    _say(config, "train", train)
    _say(config, "val", val)
    return resolve_classes(found, val, "val"), train, val


def prepare(config: Settings, split: str, classes: Sequence[str] | None = None) -> Prepared:
    """Opens a split, says what it has, and builds the model of checked settings, without weights.

    Args:
      classes: names that number the images' classes; None: the dataset numbers its own.

    Raises:
      InputError: a setting or the dataset cannot be used.
    """
    source = source_of(config.dataset, split, classes=classes)
    _say(config, split, source)
    found = resolve_classes(config, source, split)
    return Prepared(found, source, make_mesh(**vars(found.mesh)), abstract_model(found))


def _say(config: Settings, split: str, source: EncodedSource) -> None:
    """Says how many images a split has, and what was left out."""
    name = config.dataset.val_split if split == "val" else config.dataset.train_split
    print(f"split {name!r} of {config.dataset.name}: {describe_files(source)}")


class Program(NamedTuple):
    """A training run without its data."""

    train_step: jax.stages.Wrapped  # see `make_train_step`
    eval_step: jax.stages.Wrapped  # see `make_eval_step`
    fresh: Callable[[], bridge.Weights]  # initial weights, from the seed
    begin: Callable[[bridge.Weights], State]  # from them to the state before the first step
    state: State  # its shapes and dtypes
    shardings: State  # and where its arrays lie
    flops: Callable[[], int]  # counts those of one training step

    def placed(self) -> State:
        """The state's shapes and dtypes, and where its arrays lie: enough to compile for it."""
        return jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            self.state,
            self.shardings,
        )


def evaluation_step(program: Program) -> Callable[..., Any]:
    """Compiled once, unless the averaged weights lie elsewhere than the trained ones."""
    where = program.shardings
    alike = where.get("ema", weights_of(where)) == weights_of(where)
    return CompiledOnce(program.eval_step, "evaluation step") if alike else program.eval_step


def batch_shapes(
    config: Settings, mesh: Mesh, *, evaluation: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and places of a batch without label maps: enough to compile for it."""
    size = round_up(config.eval.batch_size, mesh) if evaluation else config.batch_size
    side, split = config.model.image_size, batch_sharded(mesh)
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "image": ((size, side, side, 3), jnp.uint8),
        "label": ((size,), jnp.int32),
    }
    if evaluation:
        shapes |= {"index": ((size,), jnp.int32), "mask": ((size,), jnp.float32)}
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=split)
        for name, (shape, dtype) in shapes.items()
    }


def check_same_everywhere(config: Settings, *sources: EncodedSource) -> None:
    """Raises InputError if this process was not started with the settings and data of the first."""
    mine = settings.to_plain(config) | {
        f"data {i}": fingerprint(source) for i, source in enumerate(sources)
    }
    mine |= {"commit": versions()["commit"], "numerics": numerics()}
    of_host = [field.name for field in settings.FIELDS.values() if field.of_host]
    first = from_first("compare the settings", lambda: mine)
    if lines := [
        f"  {name}: there {theirs!r}, here {ours!r}"
        for name, theirs, ours in differences(first, mine, of_host)
    ]:
        raise InputError(
            "this process was started with other settings, data or code than the first one; give "
            "the same to all:\n" + "\n".join(lines)
        )


def checked(config: settings.Tree) -> Settings:
    """Reads a config at a program's door: every value checked, and that its names are known.

    Patterns of what decays that only parts had which `model.overrides` replaces are left out.

    Raises:
      InputError: naming every field whose value cannot be used.
    """
    found = settings.from_config(config)
    registry.check_overrides(found.model.name, found.model.overrides)
    parse_policy(found.augment.auto_augment)
    return _without_replaced_parts(found)


def _without_replaced_parts(config: Settings) -> Settings:
    model, optimizer = config.model, config.optimizer
    fields = {name: getattr(optimizer, name) for name in ("decay_also", "decay_never")}
    if not model.overrides or not any(fields.values()):
        return config

    def paths(overrides, image_size):
        built = bridge.abstract(
            lambda: registry.create_model(
                model.name, num_classes=1, image_size=image_size, dtype="float32", **overrides
            )
        )
        return flatten(bridge.get_weights(built)["params"])

    ours, released = paths(model.overrides, model.image_size), paths({}, None)
    changes = {}
    for name, patterns in fields.items():
        gone = [x for x in patterns if not found_in(x, ours) and found_in(x, released)]
        if gone:
            changes[f"optimizer.{name}"] = tuple(x for x in patterns if x not in gone)
            print(
                f"--config.optimizer.{name}: {', '.join(map(repr, gone))} left out, for "
                "--config.model.overrides replaces what it is for"
            )
    return settings.replace(config, changes) if changes else config


def resolve_classes(config: Settings, source: Source, split: str = "train") -> Settings:
    """Fills in `model.num_classes` where it is 0; InputError if too small for a split's images."""
    count, found = config.model.num_classes or source.num_classes, source.num_classes
    if count < found and split == "train":
        raise InputError(
            f"--config.model.num_classes={count}, but dataset {config.dataset.name} has {found} "
            "classes; leave it 0 for that number"
        )
    if count < found:
        raise InputError(
            f"the split {config.dataset.val_split!r} of dataset {config.dataset.name} has labels "
            f"up to {found - 1}, but the model has {count} classes, 0 to {count - 1}. Correct the "
            "labels; or, if a number means the same class in all splits, train a model of all: "
            f"--config.model.num_classes={found}"
        )
    return settings.replace(config, {"model.num_classes": count})


def build_model(config: Settings, *, rngs: nnx.Rngs) -> Backbone:
    """Builds the model of settings whose number of classes is known."""
    model = config.model
    built = registry.create_model(
        model.name,
        num_classes=model.num_classes,
        image_size=model.image_size,
        dtype=jnp.dtype(model.dtype),
        implementation=model.implementation,
        rngs=rngs,
        **{"drop_path": model.drop_path, **model.overrides},
    )
    if model.batch_norm_group and not group_batch_norms(built, model.batch_norm_group):
        raise InputError(
            f"--config.model.batch_norm_group={model.batch_norm_group}, but {model.name} has no "
            "batch norms; use 0"
        )
    return built


def training_program(config: Settings, mesh: Mesh, steps_per_epoch: int) -> Program:
    """Builds the program of a checked config whose number of classes is known; compiles nothing."""
    model = abstract_model(config)
    peak = peak_learning_rate(config.optimizer, config.batch_size)
    schedule = make_schedule(config.schedule, peak, steps_per_epoch)
    optimizer = make_optimizer(config.optimizer, schedule, model.structure)

    def fresh():
        return bridge.get_weights(build_model(config, rngs=nnx.Rngs(config.seed)))

    def begin(weights):
        return new_state(weights, optimizer, config.ema_decay)

    state = jax.eval_shape(begin, bridge.get_weights(model))
    scan = scans(config.model, mesh)
    shardings = _shardings(state, config, mesh, model.structure)
    train_step = make_train_step(
        as_training_function(model, config.model.remat, scan=scan),
        optimizer,
        schedule,
        config,
        mesh,
        mix_until=config.augment.mix_off_epoch * steps_per_epoch or None,
        shardings=shardings,
    )
    where = weights_of(shardings.state)
    eval_step = make_eval_step(as_function(model, scan=scan), config.dataset, mesh, where)

    def flops():
        return training_flops(model, config.model.image_size, config.batch_size)

    return Program(train_step, eval_step, fresh, begin, state, shardings.state, flops)


def abstract_model(config: Settings) -> Backbone:
    """Builds the model of settings whose number of classes is known, without weights."""
    return bridge.abstract(lambda: build_model(config, rngs=nnx.Rngs(0)))


def _shardings(state: State, config: Settings, mesh: Mesh, structure: Structure) -> Shardings:
    options = vars(config.sharding)
    say_unused_rules(options["rules"], state)
    whole = state_shardings(state, mesh, structure, **options)
    if all(sharding.is_fully_replicated for sharding in jax.tree.leaves(whole)):
        return Shardings(whole, None)
    # Gradients lie where the optimizer's moments of the same parameters do.
    moments = state_shardings({"opt_state": state["params"]}, mesh, structure, **options)
    return Shardings(whole, moments["opt_state"])
