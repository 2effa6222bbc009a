"""A program that compiles in under a second, to run the real loop with: a linear model of digits.

As a program of its own, with the flags of `hybrid_flax.main`:
python -m tests.toy --config=tests/toy.py --workdir=DIR
"""

import os
import signal
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections

import hybrid_flax.train
from hybrid_flax import cli
from hybrid_flax.build import Program
from hybrid_flax.distributed.batch import batch_sharded
from hybrid_flax.distributed.mesh import replicated
from hybrid_flax.distributed.shardings import state_shardings
from hybrid_flax.models.unified.model import Unified
from hybrid_flax.settings import Settings
from tests import tiny

BAD_LABEL = 77  # its loss is not a number
FLOPS = 1000


def get_config(**overrides) -> ml_collections.ConfigDict:
    """Ten steps over two epochs of 320 digits of 8 pixels; logged every second step.

    Overrides by dotted name with "." as "__".
    """
    defaults = {
        "model__image_size": 8,
        "model__num_classes": 10,
        "batch_size": 64,
        "dataset__train_split": "train[:320]",
        "dataset__val_split": "val[:64]",
        "dataset__num_workers": 0,
        "augment__auto_augment": "",
    }
    return tiny.get_config(**defaults | overrides)


def program(config: Settings, mesh: jax.sharding.Mesh, _: int) -> Program:
    """The program of a toy config, as `build.training_program` gives it for any other."""
    size, classes = config.model.image_size, config.model.num_classes

    def logits_of(params, images):
        images = images.reshape(len(images), -1).astype(jnp.float32) / 255
        head = params["head"]
        return images @ head["kernel"] + head["bias"][None]

    def loss_of(params, batch, noise):
        labels = batch["label"]
        losses = -jax.nn.log_softmax(logits_of(params, batch["image"]))
        loss = jnp.take_along_axis(losses, labels[:, None] % classes, axis=1)[:, 0]
        return (loss * jnp.where(labels == BAD_LABEL, jnp.nan, noise)).mean()

    def train_step(state, batch):
        # A draw that follows from the step: whether it is the right one shows in every bit.
        key = jax.random.fold_in(jax.random.key(config.seed), state["step"])
        noise = jax.random.uniform(key, (config.batch_size,), minval=0.5)
        loss, grads = jax.value_and_grad(loss_of)(state["params"], batch, noise)
        fine = jnp.isfinite(loss)
        moments = jax.tree.map(lambda m, g: 0.9 * m + g, state["opt_state"], grads)
        params = jax.tree.map(lambda p, m: p - 0.1 * m, state["params"], moments)
        new = {"params": params, "opt_state": moments}
        if "ema" in state:
            new["ema"] = jax.tree.map(
                lambda old, now: 0.9 * old + 0.1 * now, state["ema"], {"params": params}
            )
        new = jax.tree.map(lambda n, o: jnp.where(fine, n, o), new, {k: state[k] for k in new})
        metrics = {
            "loss": loss,
            "grad_norm": jnp.sqrt(sum(jnp.sum(g * g) for g in jax.tree.leaves(grads))),
            "learning_rate": jnp.float32(0.1),
            "non_finite": jnp.where(fine, -1, 1).astype(jnp.int32),
        }
        return new | {"step": state["step"] + 1}, metrics

    def eval_step(weights, batch):
        mask, labels = batch["mask"], batch["label"]
        logits = logits_of(weights["params"], batch["image"])
        best = jax.lax.top_k(logits, min(5, classes))[1] == labels[:, None]
        loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
        return {
            "top1": (best[:, 0] * mask).sum(),
            "top5": (best.any(-1) * mask).sum(),
            "loss": (loss * mask).sum(),
            "images": mask.sum(),
        }

    def fresh():
        key = jax.random.key(config.seed)
        kernel = 0.01 * jax.random.normal(key, (3 * size * size, classes))
        return {"params": {"head": {"kernel": kernel, "bias": jnp.zeros(classes)}}}

    def begin(weights):
        state = {"step": jnp.zeros((), jnp.int32), **weights}
        state["opt_state"] = jax.tree.map(jnp.zeros_like, weights["params"])
        return state | ({"ema": jax.tree.map(jnp.copy, weights)} if config.ema_decay else {})

    state = jax.eval_shape(lambda: begin(fresh()))
    shardings = state_shardings(state, mesh, Unified.structure, **vars(config.sharding))
    batch = batch_sharded(mesh)
    return Program(
        jax.jit(
            train_step,
            in_shardings=(shardings, batch),
            out_shardings=(shardings, replicated(mesh)),
            donate_argnums=0,
        ),
        jax.jit(eval_step, in_shardings=(None, batch), out_shardings=replicated(mesh)),
        fresh,
        begin,
        state,
        shardings,
        lambda: FLOPS,
    )


def disturbed(disturb: Callable[[int], None]) -> Callable[..., Program]:
    """Makes what stands for `program`, and calls `disturb(step)` before each step, from 0."""

    def build(config, mesh, steps_per_epoch):
        made = program(config, mesh, steps_per_epoch)

        class Step:
            def trace(self, *arguments):
                self.step = made.train_step.lower(*arguments).compile()
                return self

            def lower(self):
                return self

            def compile(self):
                return self

            def __call__(self, state, batch):
                disturb(int(jax.device_get(state["step"])))
                return self.step(state, batch)

        return made._replace(train_step=Step())

    return build


def stopping(number: signal.Signals, after: int) -> Callable[..., Program]:
    """Makes a program that gets a signal when so many steps are done."""
    return disturbed(lambda step: os.kill(os.getpid(), number) if step == after else None)


def train(
    config: ml_collections.ConfigDict,
    workdir: str | os.PathLike,
    *,
    build: Callable[..., Program] = program,
    profile: str = "",
) -> int:
    """Runs `hybrid_flax.train.train` with the toy program."""
    return hybrid_flax.train.train(config, os.fspath(workdir), build=build, profile=profile)


if __name__ == "__main__":
    cli.run(train, in_parallel=True)
