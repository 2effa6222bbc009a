"""The training step and the evaluation step, each one compiled function.

In order: uint8 images → mixup or cutmix → normalise → erase (or normalise → erase → mix) → model
(drop path) → loss → gradients over micro-batches → clip → optimizer → EMA. All randomness follows
from (seed, step). A step whose loss or gradients are not finite counts, but changes nothing.

The training state is a dictionary: `step` (int32 scalar, steps done), `params`, `opt_state`,
`batch_stats` where the model has batch norms, and `ema`, the averaged weights, where the config
asks for them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from hybrid_flax.distributed.batch import batch_sharded
from hybrid_flax.distributed.mesh import on_mesh, replicated
from hybrid_flax.distributed.shardings import unsharded
from hybrid_flax.settings import Augment, Dataset, Settings
from hybrid_flax.training.batch_augmentation import mix, normalise, random_erasing
from hybrid_flax.training.losses import cross_entropy, make_loss, smoothed_one_hot
from hybrid_flax.training.optimizers import trainable
from hybrid_flax.training.schedules import Schedule

State = dict[str, Any]
Metrics = dict[str, jax.Array]


class Shardings(NamedTuple):
    """Places of the arrays of a training run: see `distributed/shardings.py`."""

    state: Any  # a sharding, or a tree of them like the state
    gradients: Any  # a tree like the parameters; None: wherever XLA puts them


def new_state(weights, optimizer: optax.GradientTransformation, ema_decay: float) -> State:
    """The state before the first step; the average starts at the initial weights."""
    state = {
        "step": jnp.zeros((), jnp.int32),
        "opt_state": optimizer.init(weights["params"]),
        **weights,
    }
    return state | ({"ema": jax.tree.map(jnp.copy, weights)} if ema_decay else {})


def weights_of(state: State) -> dict[str, Any]:
    """The trained weights in a state, as `bridge.get_weights` gives them."""
    return {name: state[name] for name in ("params", "batch_stats") if name in state}


def make_train_step(
    apply: Callable[..., tuple[Any, Any]],
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    config: Settings,
    mesh: Mesh,
    mix_until: int | None = None,
    shardings: Shardings | None = None,
) -> jax.stages.Wrapped:
    """Compiles `step(state, batch) → (state, metrics)`; the state that is passed in is consumed.

    `apply` is the model from `functions.as_training_function`. `batch` has `image` uint8
    [B, H, W, 3] and `label` int32 [B], split over the mesh's data axis, and for token labelling
    may have `label_map` and `crop`, as `data.transforms.TrainTransform` gives them. The metrics are
    float32 scalars: `loss` (mean over the batch), `grad_norm` (before clipping) and
    `learning_rate`; and `non_finite`, an int32 scalar: -1, or the number, in the order of
    `paths.flatten`, of the first parameter whose gradient is not finite.

    From step `mix_until` on nothing is mixed. Batch norms take their statistics over the whole
    micro-batch, on however many devices it is, or over groups of its images
    (`layers.group_batch_norms`). Without `shardings` the state is whole on every device.
    """
    shardings = shardings or Shardings(replicated(mesh), None)
    loss_of_outputs = make_loss(config.loss)

    def loss_of(params, batch_stats, images, targets, key):
        if shardings.gradients:
            params = jax.lax.with_sharding_constraint(params, unsharded(shardings.gradients))
        weights = weights_of({"params": params, "batch_stats": batch_stats})
        outputs, batch_stats = apply(weights, images, train=not config.model.eval_mode, key=key)
        return loss_of_outputs(outputs, targets), batch_stats

    @on_mesh(mesh)
    def train_step(state: State, batch: dict[str, jax.Array]) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state["step"])
        mix_key, erase_key, model_key = jax.random.split(key, 3)
        targets = smoothed_one_hot(
            batch["label"], config.model.num_classes, config.loss.label_smoothing
        )
        images, mixed = augmented_batch(
            (mix_key, erase_key),
            batch["image"],
            targets,
            state["step"],
            config.augment,
            config.dataset,
            mix_until,
        )
        maps = {name: batch[name] for name in ("label_map", "crop") if name in batch}

        loss, grads, batch_stats = _accumulated(
            jax.value_and_grad(loss_of, has_aux=True),
            state["params"],
            state.get("batch_stats", {}),
            images,
            maps or mixed,
            model_key,
            config.accumulation_steps,
        )
        if config.optimizer.freeze:  # they do not count for the norm, and need not be computed
            learns = trainable(grads, config.optimizer)
            grads = jax.tree.map(lambda g, yes: g if yes else jnp.zeros_like(g), grads, learns)
        if shardings.gradients:  # summed to where their moments lie
            grads = jax.lax.with_sharding_constraint(grads, shardings.gradients)
        squares = [jnp.sum(jnp.square(g)) for g in jax.tree.leaves(grads)]
        grad_norm = jnp.sqrt(sum(squares))
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        new = {"step": state["step"] + 1, "params": params, "opt_state": opt_state}
        if batch_stats:
            new["batch_stats"] = batch_stats
        if "ema" in state:
            decay: float | jax.Array = config.ema_decay
            if config.ema_warmup:
                decay = jnp.minimum(decay, (1 + state["step"]) / (10 + state["step"]))
            new["ema"] = _average(state["ema"], weights_of(new), decay)
        fine = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        kept = {name: state[name] for name in new} | {"step": new["step"]}
        new = jax.tree.map(lambda new, old: jnp.where(fine, new, old), new, kept)
        bad = ~jnp.isfinite(jnp.stack(squares))
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "learning_rate": schedule(state["step"]),
            "non_finite": jnp.where(bad.any(), jnp.argmax(bad), -1).astype(jnp.int32),
        }
        return new, metrics

    return jax.jit(
        train_step,
        in_shardings=(shardings.state, batch_sharded(mesh)),
        out_shardings=(shardings.state, replicated(mesh)),
        donate_argnums=0,
    )


def augmented_batch(
    keys: tuple[jax.Array, jax.Array],
    images: jax.Array,
    targets: jax.Array,
    step: jax.Array,
    augment: Augment,
    dataset: Dataset,
    mix_until: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Normalises, mixes and erases a batch in the order that `augment` asks for.

    Args:
      keys: for mixing and for erasing.
      images: uint8 [B, H, W, 3].
      targets: float32 [B, classes].
      step: int32 scalar; from `mix_until` on nothing is mixed.

    Returns:
      (float32 images, targets) of the same shapes.
    """
    mix_key, erase_key = keys
    probability: float | jax.Array = augment.mix_probability
    if mix_until is not None:
        probability = jnp.where(step < mix_until, jnp.float32(probability), 0)

    def mixed(images):
        return mix(
            mix_key,
            images,
            targets,
            mixup_alpha=augment.mixup_alpha,
            cutmix_alpha=augment.cutmix_alpha,
            cutmix_probability=augment.cutmix_probability,
            probability=probability,
            group=augment.mix_group,
        )

    def normalised_and_erased(images):
        images = normalise(images, dataset.mean, dataset.std)
        return random_erasing(erase_key, images, augment.erasing_probability)

    if augment.erase_before_mix:
        return mixed(normalised_and_erased(images))
    images, targets = mixed(images)
    return normalised_and_erased(images), targets


def _average(average, weights, decay: float | jax.Array):
    """The moving average; counters are not averaged but taken over."""

    def update(old, new):
        return decay * old + (1 - decay) * new if jnp.issubdtype(new.dtype, jnp.floating) else new

    return jax.tree.map(update, average, weights)


def _accumulated(value_and_grad, params, batch_stats, images, targets, key, count: int):
    """Mean loss and gradients over `count` micro-batches, one in memory at a time.

    Returns (loss, gradients, batch statistics after the last micro-batch).
    """
    if count == 1:
        (loss, batch_stats), grads = value_and_grad(params, batch_stats, images, targets, key)
        return loss, grads, batch_stats

    def split(x):
        # Micro-batch i takes every count-th image, so that each device keeps its own images.
        return x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)

    def add(carry, micro_batch):
        total, batch_stats = carry
        index, images, targets = micro_batch
        (loss, batch_stats), grads = value_and_grad(
            params, batch_stats, images, targets, jax.random.fold_in(key, index)
        )
        return (jax.tree.map(jnp.add, total, (loss, grads)), batch_stats), None

    zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
    micro_batches = (jnp.arange(count), split(images), jax.tree.map(split, targets))
    (total, batch_stats), _ = jax.lax.scan(add, (zero, batch_stats), micro_batches)
    return *jax.tree.map(lambda x: x / count, total), batch_stats


def make_eval_step(
    apply: Callable[..., jax.Array], dataset: Dataset, mesh: Mesh, shardings: Any = None
) -> jax.stages.Wrapped:
    """Compiles `step(weights, batch) → sums`.

    `apply` is the model from `functions.as_function`. `batch` has `image` uint8 [B, H, W, 3],
    `label` int32 [B] and `mask` float32 [B], 0 for rows that do not count. The sums over counted
    images are `top1`, `top5`, `loss` and `images`. What has a logit that is not finite cannot be
    scored, and is counted as `non_finite` alone; a label beyond the logits makes the loss NaN. The
    weights may lie as they like; `shardings` say where trained ones do, and are needed where those
    are split.
    """

    @on_mesh(mesh)
    def eval_step(weights, batch):
        if shardings:
            weights = jax.lax.with_sharding_constraint(weights, unsharded(shardings))
        images = normalise(batch["image"], dataset.mean, dataset.std)
        logits, labels, counted = apply(weights, images), batch["label"], batch["mask"] > 0
        classes = logits.shape[-1]
        finite = jnp.isfinite(logits).all(axis=-1)
        scored = counted & finite
        best = jax.lax.top_k(logits, min(5, classes))[1] == labels[:, None]
        loss = cross_entropy(logits, jax.nn.one_hot(labels, classes))
        loss = jnp.where(labels < classes, loss, jnp.nan)  # of zeros in place of a target it is 0
        return {
            "top1": jnp.sum(best[:, 0], where=scored, dtype=jnp.float32),
            "top5": jnp.sum(best.any(axis=-1), where=scored, dtype=jnp.float32),
            "loss": jnp.sum(loss, where=scored),
            "images": jnp.sum(scored, dtype=jnp.float32),
            "non_finite": jnp.sum(counted & ~finite, dtype=jnp.float32),
        }

    return jax.jit(
        eval_step,
        in_shardings=(None, batch_sharded(mesh)),
        out_shardings=replicated(mesh),
    )
