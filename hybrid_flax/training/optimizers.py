"""Optimizers from the config's numbers: which parameters learn, how fast, and what decays."""

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hybrid_flax.errors import InputError
from hybrid_flax.models.structure import Structure
from hybrid_flax.settings import Optimizer
from hybrid_flax.training.schedules import Schedule
from hybrid_flax.weights.paths import flatten, unflatten_like


def make_optimizer(
    config: Optimizer, schedule: Schedule, structure: Structure
) -> optax.GradientTransformation:
    """Chains clipping and the optimizer `config.name` with weight decay of some parameters.

    - `adamw` (arXiv:1711.05101), as PyTorch computes it;
    - `lamb` (arXiv:1904.00962): the layer-wise ratio applies to the decayed parameters only, as in
      timm;
    - `sgd` with `momentum` and `nesterov`: decay is added to the gradient, as PyTorch does it;
    - `lion` (arXiv:2302.06675): its authors take b1=0.9, b2=0.99, and a learning rate 3 to 10 times
      below AdamW's with as much more decay;
    - `adafactor` (arXiv:1804.04235): without momentum; the step is relative to each parameter's
      root mean square.

    Parameters that `freeze` names get no update and no decay, have no state, and do not count in
    the norm that is clipped. With `layer_decay` below 1 the learning rate is that many times
    smaller with each layer further from the classifier. `structure` is the model's: it says which
    layer a parameter lies in, and what the classifier is, which adaptive clipping leaves out.
    """

    def mask(params):
        return decayed(params, config)

    decay = optax.add_decayed_weights(config.weight_decay, mask)
    rules = {
        "adamw": lambda: [_scale_by_adam(config.b1, config.b2, config.eps), decay],
        "lamb": lambda: [
            _scale_by_adam(config.b1, config.b2, config.eps),
            decay,
            optax.masked(optax.scale_by_trust_ratio(), mask),
        ],
        "sgd": lambda: [decay, optax.trace(config.momentum, config.nesterov)],
        "lion": lambda: [optax.scale_by_lion(config.b1, config.b2), decay],
        "adafactor": lambda: [
            optax.scale_by_factored_rms(),
            optax.clip_by_block_rms(1.0),
            optax.scale_by_param_block_rms(),
            decay,
        ],
    }
    steps = [
        *_clipping(config, structure),
        *rules[config.name](),
        optax.scale_by_learning_rate(schedule),
    ]
    if config.freeze:
        steps = _for_trainable(optax.chain(*steps), config)
    if config.layer_decay != 1:
        steps.append(_scale_by_depth(config.layer_decay, structure))
    return optax.chain(*steps)


def trainable(params, config: Optimizer):
    """Says which parameters learn, as a tree of booleans: all that `config.freeze` does not find.

    Raises:
      InputError: an expression that matches no parameter, or none is left to learn.
    """
    flat = flatten(params)
    _check_patterns("freeze", config.freeze, flat)
    learns = {path: not _matches(config.freeze, path) for path in flat}
    if not any(learns.values()):
        raise InputError(
            f"--config.optimizer.freeze={tuple(config.freeze)} leaves no parameter to train"
        )
    return unflatten_like(params, learns)


def decayed(params, config: Optimizer):
    """Says which parameters weight decay applies to, as a tree of booleans.

    They are those of rank 2 or more: biases, norms and layer scales have rank 1. The regular
    expressions in `config.decay_also` and `config.decay_never`, on paths like
    `stages/0/norm/scale`, make exceptions; the authors' grouping goes by the rank in PyTorch, which
    differs in places.

    Raises:
      InputError: an expression that matches no parameter.
    """
    flat = flatten(params)
    if not any(map(_is_masked, jax.tree.leaves(params, is_leaf=_is_masked))):
        _check_patterns("decay_also", config.decay_also, flat)
        _check_patterns("decay_never", config.decay_never, flat)

    def decays(path, leaf):
        if _matches(config.decay_never, path):
            return False
        return leaf.ndim > 1 or _matches(config.decay_also, path)

    return unflatten_like(params, {path: decays(path, leaf) for path, leaf in flat.items()})


def _is_masked(leaf) -> bool:
    """Whether this is a frozen parameter's place, seen from inside `optax.masked`."""
    return isinstance(leaf, optax.MaskedNode)


def _matches(patterns: Iterable[str], path: str) -> bool:
    return any(re.search(pattern, path) for pattern in patterns)


def found_in(pattern: str, paths: Iterable[str]) -> bool:
    """Whether an expression matches any of these paths."""
    return any(re.search(pattern, path) for path in paths)


def _check_patterns(field: str, patterns: Iterable[str], paths: Collection[str]) -> None:
    for pattern in patterns:
        if not found_in(pattern, paths):
            some = ", ".join(list(paths)[:: -(-len(paths) // 4) or 1])
            raise InputError(
                f"--config.optimizer.{field}: {pattern!r} matches no parameter of this model, "
                f"whose names are like {some}; parameters.txt of a run lists all"
            )


# ------------------------------------------------------------------------------------- the parts


def _for_trainable(
    optimizer: optax.GradientTransformation, config: Optimizer
) -> list[optax.GradientTransformation]:
    """Gives updates to what is not frozen, and none to the rest."""

    def learns(params):
        return trainable(params, config)

    def frozen(params):
        return jax.tree.map(lambda learns: not learns, learns(params))

    # A masked optimizer lets the gradients of the others through: they have to be taken away.
    return [optax.masked(optimizer, learns), optax.masked(optax.set_to_zero(), frozen)]


def _clipping(config: Optimizer, structure: Structure) -> list[optax.GradientTransformation]:
    """Clips as `clip_adaptive`, `clip_value` and `clip_norm` say, in this order."""
    steps = []
    if config.clip_adaptive:

        def not_classifier(params):
            clipped = {path: not structure.is_classifier(path) for path in flatten(params)}
            return unflatten_like(params, clipped)

        steps.append(optax.masked(optax.adaptive_grad_clip(config.clip_adaptive), not_classifier))
    if config.clip_value:
        steps.append(optax.clip(config.clip_value))
    if config.clip_norm:
        steps.append(optax.clip_by_global_norm(config.clip_norm))
    return steps


class _AdamState(NamedTuple):
    count: jax.Array  # type: ignore[assignment]  # int32 scalar, updates done; hides tuple.count
    mu: optax.Updates
    nu: optax.Updates


def _scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """`optax.scale_by_adam`, but for the bias corrections 1 - bᵗ, which are exact here.

    In float32 0.999 is 0.99900001, so that optax's first steps are 6e-6 too short: more than
    PyTorch, whose corrections are computed in float64, differs from itself on other machines.
    """

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return _AdamState(jnp.zeros((), jnp.int32), zeros, jax.tree.map(jnp.copy, zeros))

    def update(grads, state, params=None):
        del params
        count = optax.safe_increment(state.count)
        mu = jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.mu, grads)
        nu = jax.tree.map(lambda v, g: b2 * v + (1 - b2) * g * g, state.nu, grads)
        first, second = (_one_minus_power(b, count) for b in (b1, b2))
        updates = jax.tree.map(
            lambda m, v: (m / first) / (jnp.sqrt(v) / jnp.sqrt(second) + eps), mu, nu
        )
        return updates, _AdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _one_minus_power(base: float, exponent: jax.Array) -> jax.Array:
    """1 - baseᵉ in float32, to its last bits also where the power is near 1."""
    if base == 0:
        return jnp.ones((), jnp.float32)
    return -jnp.expm1(exponent.astype(jnp.float32) * np.float32(np.log(base)))


def _scale_by_depth(decay: float, structure: Structure) -> optax.GradientTransformation:
    """Multiplies updates by decay^(layers between the parameter and the classifier)."""

    def update(updates, state, params=None):
        del params
        ids = structure.layer_ids(flatten(updates))
        last = max(ids.values())
        scales = {path: decay ** (last - number) for path, number in ids.items()}
        scales = unflatten_like(updates, scales)
        return jax.tree.map(lambda update, scale: update * scale, updates, scales), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
