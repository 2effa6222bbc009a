"""Builds what a config asks for: the model of a program, and what a run computes at every step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
from flax import nnx
from jax.sharding import Mesh

from hybrid_flax.config import build_model, check, resolve_classes
from hybrid_flax.costs.flops import training_flops
from hybrid_flax.data.sources import EncodedSource, source_of
from hybrid_flax.distributed.mesh import make_mesh
from hybrid_flax.distributed.shardings import state_shardings
from hybrid_flax.models.structure import Structure
from hybrid_flax.training.optimizers import make_optimizer
from hybrid_flax.training.schedules import make_schedule, peak_learning_rate
from hybrid_flax.training.step import (
    Shardings,
    State,
    make_eval_step,
    make_train_step,
    new_state,
    weights_of,
)
from hybrid_flax.weights import bridge
from hybrid_flax.weights.functions import as_function, as_training_function


class Prepared(NamedTuple):
    """What programs that run a model begin with."""

    config: ml_collections.ConfigDict  # checked, with the number of classes
    source: EncodedSource
    mesh: Mesh
    model: nnx.Module  # abstract


def open_split(
    config: ml_collections.ConfigDict, split: str
) -> tuple[ml_collections.ConfigDict, EncodedSource]:
    """Checks a config and opens a split, "train" or "val", of its dataset.

    Returns:
      (a copy of the config that has the number of classes, the images of the split)

    Raises:
      InputError: a setting or the dataset cannot be used.
    """
    check(config)
    source = source_of(config.dataset, split)
    return resolve_classes(config, source), source


def prepare(config: ml_collections.ConfigDict, split: str) -> Prepared:
    """Checks a config, opens a split of its dataset and builds its model, without weights.

    Raises:
      InputError: a setting or the dataset cannot be used.
    """
    config, source = open_split(config, split)
    mesh = make_mesh(**config.mesh)
    return Prepared(config, source, mesh, _abstract_model(config))


class Program(NamedTuple):
    """A training run without its data."""

    train_step: jax.stages.Wrapped  # see `make_train_step`
    eval_step: Callable[..., dict[str, jax.Array]]  # see `make_eval_step`
    fresh: Callable[[], bridge.Weights]  # initial weights, from the seed
    begin: Callable[[bridge.Weights], State]  # from them to the state before the first step
    state: State  # its shapes and dtypes
    shardings: State  # and where its arrays lie
    flops: Callable[[], int]  # counts those of one training step


class CompiledOnce:
    """A step that is compiled at its first call, for those arguments and no others.

    A later call with another shape, dtype or sharding is an error that names it: under `jit` it
    would compile again, minutes that nobody sees.
    """

    def __init__(self, step: jax.stages.Wrapped):
        self._step = step
        self._compiled: jax.stages.Compiled | None = None

    def __call__(self, *arguments: Any) -> Any:
        if self._compiled is None:
            with jax.transfer_guard("allow"):  # constants of the program
                self._compiled = self._step.lower(*arguments).compile()
        return self._compiled(*arguments)


def training_program(
    config: ml_collections.ConfigDict, mesh: Mesh, steps_per_epoch: int
) -> Program:
    """Builds the program of a checked config whose number of classes is known; compiles nothing."""
    model = _abstract_model(config)
    peak = peak_learning_rate(config.optimizer, config.batch_size)
    schedule = make_schedule(config.schedule, peak, steps_per_epoch)
    optimizer = make_optimizer(config.optimizer, schedule, model.structure)

    def fresh():
        return bridge.get_weights(build_model(config, rngs=nnx.Rngs(config.seed)))

    def begin(weights):
        return new_state(weights, optimizer, config.ema_decay)

    state = jax.eval_shape(begin, bridge.get_weights(model))
    shardings = _shardings(state, config, mesh, model.structure)
    train_step = make_train_step(
        as_training_function(model, config.model.remat),
        optimizer,
        schedule,
        config,
        mesh,
        mix_until=config.augment.mix_off_epoch * steps_per_epoch or None,
        shardings=shardings,
    )
    eval_step = make_eval_step(as_function(model), config, mesh, weights_of(shardings.state))

    def flops():
        return training_flops(model, config.model.image_size, config.batch_size)

    return Program(train_step, eval_step, fresh, begin, state, shardings.state, flops)


def _abstract_model(config: ml_collections.ConfigDict) -> nnx.Module:
    return bridge.abstract(lambda: build_model(config, rngs=nnx.Rngs(0)))


def _shardings(
    state: State, config: ml_collections.ConfigDict, mesh: Mesh, structure: Structure
) -> Shardings:
    whole = state_shardings(state, mesh, structure, **config.sharding)
    if all(sharding.is_fully_replicated for sharding in jax.tree.leaves(whole)):
        return Shardings(whole, None)
    # Gradients lie where the optimizer's moments of the same parameters do.
    moments = state_shardings({"opt_state": state["params"]}, mesh, structure, **config.sharding)
    return Shardings(whole, moments["opt_state"])
