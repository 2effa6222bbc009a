"""Ten steps of each recipe beside a training loop in PyTorch that shares only the model with ours.

The loop's loss, schedule, parameter groups, clipping, optimizer, weight average and the numbers of
each recipe are written here from the papers' settings (docs/recipes.md), under the names and in the
layouts of the released checkpoints. Outputs and gradients of the model at the loop's weights come
from our compiled step: that these are the official ones is what `tests/parity.py` measures.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from torch.nn import functional

import configs
import convert
import hybrid_flax
from hybrid_flax.distributed.mesh import make_mesh, replicated
from hybrid_flax.settings import from_config
from hybrid_flax.training import step as step_module
from hybrid_flax.training.optimizers import make_optimizer
from hybrid_flax.training.schedules import make_schedule, peak_learning_rate
from hybrid_flax.weights import bridge
from hybrid_flax.weights.functions import as_training_function
from tests import reference
from tests.training.digits import MODELS

STEPS, PER_EPOCH, WARMUP, CLASSES = 10, 2, 2, 10  # warm-up in epochs; five epochs in all
EMA = 0.9  # in place of 0.9998 and 0.9999, which have not moved after ten steps
SLOWER = 0.1  # of the peak rate: with four images a step, the papers' would amplify rounding


class Recipe(NamedTuple):
    rates: str
    peak: float
    first: float  # learning rate
    last: float
    ema: bool = True
    clip: float | None = 5.0
    group: str = "timm"  # rule that says what decays
    keep: tuple[str, ...] = ()  # the model's own list of names that do not decay
    loss: str = "softmax"
    optimizer: str = "adamw"


RECIPES = {
    "gcvit_xxt": Recipe("unshifted", 5e-3, 1e-6, 5e-6),
    "l2vit_t": Recipe("table", 4e-3, 0, 1e-6, True, None, "rank 1"),
    "glnet_4g": Recipe("continuous", 2e-3, 0, 1e-5, group="rank 1 or gamma"),
    "glnet_4g_tklb": Recipe("late", 2e-3, 1e-6, 1e-5, False, loss="tokens"),
    "ga_convnext_t": Recipe(
        "epochs", 5e-3, 1e-6, 1e-6, False, None, loss="heads", optimizer="lamb"
    ),
    "unified_convnext_micro": Recipe("table", 4e-3, 0, 1e-6, group="rank 1"),
    "unified_pvt_micro": Recipe("table", 1e-3, 1e-6, 1e-5, group="rank 1"),
}


# ---------------------------------------------------------------------------- the loop in PyTorch


def rate(recipe: Recipe, step: int) -> float:
    """The learning rate of the five programs, each with its own idea of a warm-up."""
    warmup, epochs = WARMUP, STEPS / PER_EPOCH

    def cosine(progress):
        height = recipe.peak - recipe.last
        return recipe.last + 0.5 * height * (1 + math.cos(math.pi * progress))

    def unshifted(epoch):
        if epoch < warmup:
            return recipe.first + epoch * (recipe.peak - recipe.first) / warmup
        return cosine(epoch / epochs)

    match recipe.rates:
        case "unshifted":
            return unshifted(step / PER_EPOCH)
        case "epochs":
            return unshifted(step // PER_EPOCH)
        case "late":
            return unshifted(max(step // PER_EPOCH - 1, 0))
        case "continuous":
            epoch = step / PER_EPOCH
            if epoch < warmup:
                return recipe.peak * epoch / warmup
            return cosine((epoch - warmup) / (epochs - warmup))
        case "table":
            count = warmup * PER_EPOCH
            rise = np.linspace(recipe.first, recipe.peak, count)
            return [*rise, *(cosine(i / (STEPS - count)) for i in range(STEPS - count))][step]


def decays(recipe: Recipe, name: str, shape: tuple[int, ...]) -> bool:
    low_rank = len(shape) <= 1 if recipe.group == "timm" else len(shape) == 1
    by_name = name.endswith((".gamma", ".beta")) and recipe.group == "rank 1 or gamma"
    return not (low_rank or by_name or name.endswith(".bias") or name.endswith(recipe.keep or "?"))


def loss_of(recipe: Recipe, outputs, labels: torch.Tensor) -> torch.Tensor:
    if recipe.loss == "softmax":
        return functional.cross_entropy(outputs, labels, label_smoothing=0.1)
    targets = functional.one_hot(labels, CLASSES) * 0.9 + 0.1 / CLASSES
    if recipe.loss == "heads":
        mean = outputs.mean(0).detach().log_softmax(-1)
        return sum(
            functional.binary_cross_entropy_with_logits(head, targets)
            - 0.8 * (mean.exp() * (mean - head.log_softmax(-1))).mean()
            for head in outputs
        )
    mixed = targets * (1 - outputs["mixed"]) + targets.flip(0) * outputs["mixed"]
    tokens = outputs["token_logits"].flatten(0, 1)
    dense = functional.cross_entropy(
        tokens, targets.repeat_interleave(len(tokens) // len(targets), 0)
    )
    return functional.cross_entropy(outputs["logits"], mixed) + 0.5 * dense


class Lamb(torch.optim.Optimizer):
    """As the Gramian models use it: clips by itself; the trust ratio is for what decays."""

    def __init__(self, groups, lr):
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self):
        every = [p for group in self.param_groups for p in group["params"]]
        norm = torch.sqrt(sum((p.grad.double() ** 2).sum() for p in every))
        clip = max(float(norm), 1.0)
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                for name in ("m", "v"):
                    state.setdefault(name, torch.zeros_like(p))
                state["t"] = state.get("t", 0) + 1
                gradient = p.grad / clip
                state["m"] += 0.1 * (gradient - state["m"])
                state["v"] += 0.001 * (gradient**2 - state["v"])
                m = state["m"] / (1 - 0.9 ** state["t"])
                v = state["v"] / (1 - 0.999 ** state["t"])
                update = m / (v.sqrt() + 1e-8) + group["weight_decay"] * p
                if group["weight_decay"] and p.norm() > 0 and update.norm() > 0:
                    update *= p.norm() / update.norm()
                p -= group["lr"] * update


class Loop:
    """Weights by their released names, the optimizer over them, and their average."""

    def __init__(self, recipe: Recipe, weights: dict[str, np.ndarray], trained: set[str]):
        self.recipe = recipe
        self.weights = {name: torch.tensor(array) for name, array in weights.items()}
        self.average = {name: tensor.clone() for name, tensor in self.weights.items()}
        self.trained = {name: self.weights[name] for name in self.weights if name in trained}
        groups = {True: [], False: []}
        for name, p in self.trained.items():
            groups[decays(recipe, name, p.shape)].append(p)
        groups = [
            {"params": groups[True], "weight_decay": 0.05},
            {"params": groups[False], "weight_decay": 0.0},
        ]
        kind = Lamb if recipe.optimizer == "lamb" else torch.optim.AdamW
        self.optimizer = kind(groups, lr=1.0)

    def step(self, number: int, gradients, statistics) -> None:
        for name, p in self.trained.items():
            p.grad = torch.tensor(gradients[name])
        if self.recipe.clip:
            torch.nn.utils.clip_grad_norm_(self.trained.values(), self.recipe.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate(self.recipe, number)
        self.optimizer.step()
        for name, array in statistics.items():
            self.weights[name] = torch.tensor(array)
        for name, tensor in self.weights.items():
            old = self.average[name] if tensor.is_floating_point() else tensor
            self.average[name] = EMA * old + (1 - EMA) * tensor


# ---------------------------------------------------------------------------------- ours, beside it


def recording(apply):
    """The model's outputs, kept where the step hands batch statistics on."""

    def recorded(weights, images, **arguments):
        statistics = {k: v for k, v in weights.get("batch_stats", {}).items() if k != "outputs"}
        weights = {"params": weights["params"]} | (
            {"batch_stats": statistics} if statistics else {}
        )
        outputs, statistics = apply(weights, images, **arguments)
        return outputs, {**statistics, "outputs": outputs}

    return recorded


def keeping_gradients(optimizer):
    """The optimizer, with the gradients it was given in its state."""

    def update(gradients, state, params):
        updates, inner = optimizer.update(gradients, state[0], params)
        return updates, (inner, gradients)

    return optax.GradientTransformation(
        lambda params: (optimizer.init(params), jax.tree.map(jnp.zeros_like, params)), update
    )


@pytest.fixture(autouse=True)
def one_thread():
    """Small arrays: what PyTorch's threads would share is less than what they cost each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# The loss with the most parts. The others, one optimizer, loss and kind of statistics each, with
# `make test-all`.
QUICK = ("glnet_4g_tklb",)


@pytest.mark.parametrize(
    "name",
    [
        *QUICK,
        *(pytest.param(name, marks=pytest.mark.slow) for name in RECIPES if name not in QUICK),
    ],
)
def test_ten_steps(name, monkeypatch):
    recipe = RECIPES[name]._replace(peak=RECIPES[name].peak * SLOWER)
    size, overrides = MODELS[name]
    fields = {"num_classes": CLASSES, "image_size": size, "drop_path": 0.0, **overrides}
    config = configs.load(name)
    config.model.num_classes = CLASSES
    config.augment.mixup_alpha = config.augment.cutmix_alpha = 0.0
    config.augment.erasing_probability = 0.0
    config.optimizer.learning_rate *= SLOWER
    assert (config.ema_decay > 0) == recipe.ema
    config.ema_decay *= EMA / max(config.ema_decay, EMA)
    config.schedule.warmup_epochs = float(WARMUP)
    config.schedule.decay_epochs = STEPS / PER_EPOCH
    config = from_config(config)
    monkeypatch.setattr(step_module, "normalise", lambda images, mean, std: images)

    model = reference.model(name, **fields)
    weights = bridge.get_weights(model)
    apply = recording(as_training_function(model))
    schedule = make_schedule(
        config.schedule, peak_learning_rate(config.optimizer, config.batch_size), PER_EPOCH
    )
    optimizer = keeping_gradients(make_optimizer(config.optimizer, schedule, model.structure))
    mesh = make_mesh(jax.devices()[:1])
    step = step_module.make_train_step(apply, optimizer, schedule, config, mesh)

    images = [jnp.asarray(reference.images(i, (4, size, size, 3))) for i in range(STEPS)]
    labels = np.random.default_rng(0).integers(0, CLASSES, (STEPS, 4), dtype=np.int32)
    outputs, _ = jax.eval_shape(
        lambda: apply(weights, images[0], train=True, key=jax.random.key(0))
    )
    empty = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), outputs)
    weights["batch_stats"] = weights.get("batch_stats", {}) | {"outputs": empty}

    copy = bridge.abstract(lambda: hybrid_flax.create_model(name, **fields))

    def exported(weights):
        statistics = {k: v for k, v in weights["batch_stats"].items() if k != "outputs"}
        bridge.set_weights(copy, {"params": weights["params"], "batch_stats": statistics})
        return convert.to_state_dict(copy)

    first = jax.jit(lambda weights: step_module.new_state(weights, optimizer, config.ema_decay))(
        weights
    )
    ours, oracle = (
        jax.device_put(first, replicated(mesh), may_alias=False) for _ in ("ours", "the loop's")
    )
    start = exported(weights)
    statistics = {key for key in start if key.rpartition(".")[2].startswith(("running", "num_"))}
    floats = {key for key, array in start.items() if array.dtype.kind == "f"}
    loop = Loop(recipe, start, floats - statistics)
    for i in range(STEPS):
        batch = {"image": images[i], "label": labels[i]}
        ours, metrics = step(ours, batch)
        oracle, _ = step(oracle, batch)
        outputs = jax.tree.map(
            lambda leaf: torch.tensor(np.asarray(leaf)), oracle["batch_stats"]["outputs"]
        )
        loss = float(loss_of(recipe, outputs, torch.tensor(labels[i]).long()))
        assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-4), i
        assert float(metrics["learning_rate"]) == pytest.approx(rate(recipe, i), rel=1e-5), i
        gradients = exported({**step_module.weights_of(oracle), "params": oracle["opt_state"][1]})
        after = exported(step_module.weights_of(oracle))
        loop.step(i, gradients, {key: after[key] for key in statistics})
        convert.load_state_dict(copy, loop.weights)
        oracle["params"] = jax.device_put(
            bridge.get_weights(copy)["params"], replicated(mesh), may_alias=False
        )

    pairs = [(exported(step_module.weights_of(ours)), loop.weights)]
    if recipe.ema:
        pairs.append((exported(ours["ema"]), loop.average))
    for got, want in pairs:
        # A few gradients are zero but for rounding, which AdamW makes steps of: not all can agree.
        apart = [
            np.linalg.norm(got[key] - want[key].numpy())
            / max(np.linalg.norm(got[key] - start[key]), 1e-9)
            for key in loop.trained
        ]
        assert np.quantile(apart, 0.8) < 1e-3
        for key in statistics:
            if key.endswith("num_batches_tracked"):
                assert got[key] == want[key] == STEPS
            else:
                difference = np.linalg.norm(got[key] - want[key].numpy())
                assert difference < 2e-3 * np.linalg.norm(got[key]), key
