"""What a config asks to be run at every step: by `train.py`, or compiled by `plan.py`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
from flax import nnx
from jax.sharding import Mesh

from hybrid_flax.config import build_model
from hybrid_flax.distributed.shardings import state_shardings
from hybrid_flax.models.structure import Structure
from hybrid_flax.training.optimizers import make_optimizer
from hybrid_flax.training.schedules import make_schedule, peak_learning_rate
from hybrid_flax.training.step import Shardings, State, make_train_step, new_state
from hybrid_flax.weights import bridge
from hybrid_flax.weights.functions import as_training_function


class Program(NamedTuple):
    """A training run without its data."""

    model: nnx.Module  # abstract
    train_step: Callable[..., Any]  # see `make_train_step`
    begin: Callable[[Any], State]  # from initial weights to the state before the first step
    state: State  # its shapes and dtypes
    shardings: State  # and where its arrays lie


class CompiledOnce:
    """A step that is compiled at its first call, for those arguments and no others.

    A later call with another shape, dtype or sharding is an error that names it: under `jit` it
    would compile again, minutes that nobody sees.
    """

    def __init__(self, step: Any):
        self._step = step
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, *arguments):
        if self._compiled is None:
            self._compiled = self._step.lower(*arguments).compile()
        return self._compiled(*arguments)


def training_program(
    config: ml_collections.ConfigDict, mesh: Mesh, steps_per_epoch: int
) -> Program:
    """Builds the program of a checked config whose number of classes is known; compiles nothing."""
    model = bridge.abstract(lambda: build_model(config, rngs=nnx.Rngs(0)))
    peak = peak_learning_rate(config.optimizer, config.batch_size)
    schedule = make_schedule(config.schedule, peak, steps_per_epoch)
    optimizer = make_optimizer(config.optimizer, schedule, model.structure)

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
    return Program(model, train_step, begin, state, shardings.state)


def _shardings(
    state: State, config: ml_collections.ConfigDict, mesh: Mesh, structure: Structure
) -> Shardings:
    whole = state_shardings(state, mesh, structure, **config.sharding)
    if all(sharding.is_fully_replicated for sharding in jax.tree.leaves(whole)):
        return Shardings(whole, None)
    # Gradients lie where the optimizer's moments of the same parameters do.
    moments = state_shardings({"opt_state": state["params"]}, mesh, structure, **config.sharding)
    return Shardings(whole, moments["opt_state"])
