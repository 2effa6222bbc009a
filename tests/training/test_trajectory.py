"""Eight optimizer steps beside the authors' own training code, from the same weights and images.

The bars are ten times the distance between runs that are all correct (float64, other kernels,
weights nudged in the last place); of the recorded mistakes (no clipping, other decay, other rates)
each is outside at least one of them.
"""

import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import configs
import convert
import hybrid_flax
from hybrid_flax.distributed.mesh import make_mesh, replicated
from hybrid_flax.settings import Settings, from_config
from hybrid_flax.training import step as step_module
from hybrid_flax.training.optimizers import decayed, make_optimizer
from hybrid_flax.weights import bridge
from hybrid_flax.weights.functions import as_training_function
from tests import reference
from tests.parity import GOLDEN, golden_state

# Without batch norms, and with them and with exceptions from decay.
MODELS = {"gcvit_xxt": "gcvit", "unified_swin_micro": "stm"}


class Trajectory(NamedTuple):
    golden: dict
    arrays: dict[str, np.ndarray]
    config: Settings
    model: object
    metrics: list[dict]
    before: dict[str, np.ndarray]  # under the names and in the layouts of the release
    after: dict[str, np.ndarray]
    average: dict[str, np.ndarray]

    def bar(self, name: str) -> float:
        runs = [run for run in self.golden["equally_right"].values() if isinstance(run, dict)]
        return 10 * max(run[name] for run in runs)


pytestmark = pytest.mark.slow


@pytest.fixture(
    scope="module",
    params=["gcvit_xxt", "unified_swin_micro"],
)
def trained(request) -> Trajectory:
    name = request.param
    golden = json.loads((GOLDEN / "training" / f"{name}.json").read_text())
    record = json.loads((GOLDEN / MODELS[name] / f"{name}.json").read_text())
    model = bridge.abstract(lambda: hybrid_flax.create_model(name, drop_path=0.0))
    convert.load_state_dict(model, golden_state(record))
    run = golden["run"]
    config = configs.load(name)
    config.model.num_classes = 1000
    config.ema_decay = run["ema_decay"]
    config.augment.mixup_alpha = config.augment.cutmix_alpha = 0.0
    config.augment.erasing_probability = 0.0
    config = from_config(config)
    rates = jnp.asarray(run["lr"], jnp.float32)

    def schedule(step):
        return rates[step]

    optimizer = make_optimizer(config.optimizer, schedule, model.structure)
    mesh = make_mesh(jax.devices()[:1])
    metrics = []
    with pytest.MonkeyPatch.context() as patch:
        # The recorded images are random numbers, normalised already.
        patch.setattr(step_module, "normalise", lambda images, mean, std: images)
        step = step_module.make_train_step(
            as_training_function(model), optimizer, schedule, config, mesh
        )
        weights = jax.tree.map(jnp.copy, bridge.get_weights(model))
        state = jax.device_put(
            step_module.new_state(weights, optimizer, config.ema_decay), replicated(mesh)
        )
        for i in range(run["steps"]):
            images = reference.images(golden["image_seed"] + i, (run["batch"], *run["size"], 3))
            labels = np.asarray(run["labels"][i], np.int32)
            state, numbers = step(state, {"image": images, "label": labels})
            metrics.append(jax.device_get(numbers))

    def exported(weights):
        copy = bridge.abstract(lambda: hybrid_flax.create_model(name))
        bridge.set_weights(copy, weights)
        return convert.to_state_dict(copy)

    return Trajectory(
        golden,
        np.load(GOLDEN / "training" / f"{name}.npz"),
        config,
        model,
        metrics,
        exported(bridge.get_weights(model)),
        exported(step_module.weights_of(state)),
        exported(state["ema"]),
    )


def test_losses_and_gradient_norms(trained):
    golden = trained.golden
    for ours, theirs in (("loss", "loss"), ("grad_norm", "grad_norm")):
        got = [numbers[ours] for numbers in trained.metrics]
        np.testing.assert_allclose(got, golden[theirs], rtol=trained.bar(theirs), err_msg=ours)
    rates = [numbers["learning_rate"] for numbers in trained.metrics]
    np.testing.assert_allclose(rates, golden["run"]["lr"], rtol=1e-6)


def test_the_same_parameters_decay(trained):
    weights = bridge.get_weights(trained.model)
    flags = decayed(weights["params"], trained.config.optimizer)
    flags = jax.tree.map(
        lambda leaf, flag: jnp.full(leaf.shape, flag, jnp.float32), weights["params"], flags
    )
    bridge.set_weights(trained.model, weights | {"params": flags})
    names = convert.to_state_dict(trained.model)
    bridge.set_weights(trained.model, weights)
    for key in trained.golden["decayed"]:
        assert names[key].all(), key
    for key in trained.golden["not_decayed"]:
        assert not names[key].any(), key


@pytest.mark.parametrize(
    ("which", "prefix", "column", "bar"),
    [("after", "after", 2, "samples"), ("average", "ema", 3, "ema_samples")],
)
def test_weights_and_averages_after_the_last_step(trained, which, prefix, column, bar):
    before, after = trained.before, getattr(trained, which)
    noise = trained.golden["rounding_noise"]  # gradients that are zero but for rounding
    got, want, lengths = [], [], []
    for key, numbers in trained.golden["parameters"].items():
        if key in noise:
            continue
        start = reference.samples(before[key], 16)
        got.append(reference.samples(after[key], 16) - start)
        want.append(trained.arrays[f"{prefix}:{key}"] - start)
        update = np.linalg.norm((after[key] - before[key]).astype(np.float64))
        lengths.append(abs(update / numbers[column] - 1))
    got, want = np.concatenate(got), np.concatenate(want)
    assert np.linalg.norm(got - want) / np.linalg.norm(want) < trained.bar(bar)
    assert np.median(lengths) < trained.bar("update_norm_median")


def test_batch_statistics_and_their_averages(trained):
    for module, numbers in trained.golden["batch_norm"]["modules"].items():
        got = [
            np.linalg.norm(state[f"{module}.{name}"].astype(np.float64))
            for state in (trained.after, trained.average)
            for name in ("running_mean", "running_var")
        ]
        np.testing.assert_allclose(got, numbers, rtol=2e-3, err_msg=module)
        assert trained.after[f"{module}.num_batches_tracked"] == 8
