"""A step whose loss or gradients are not finite: it changes nothing, and the run does as asked."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hybrid_flax.data import feed
from hybrid_flax.distributed.batch import to_devices
from hybrid_flax.distributed.mesh import make_mesh
from hybrid_flax.errors import TrainingError
from hybrid_flax.run.checkpoints import Checkpoints
from hybrid_flax.run.metrics import read_metrics
from hybrid_flax.settings import from_config
from hybrid_flax.training import step as step_module
from tests import tiny, toy


@pytest.fixture
def starts(monkeypatch):
    """One label of batch number 4 makes its loss NaN; the batch numbers that runs began at."""
    make_batches, begun = feed.train_batches, []

    def batches(*args, start_step, **kwargs):
        begun.append(start_step)
        for number, batch in enumerate(make_batches(*args, start_step=start_step, **kwargs)):
            if start_step + number == 4:
                batch["label"][5] = toy.BAD_LABEL
            yield batch

    monkeypatch.setattr(feed, "train_batches", batches)
    return begun


def test_neither_weights_nor_statistics_nor_average_change():
    """A linear model with a running mean; one white image of 16, on one of eight devices."""
    settings = tiny.get_config()
    settings.model.num_classes = 3
    settings.augment.mixup_alpha = settings.augment.cutmix_alpha = 0.0
    settings = from_config(settings)

    def apply(weights, images, *, train, key):
        mean = images.mean((1, 2))
        mean = jnp.where(mean.max(axis=-1, keepdims=True) > 2, jnp.inf, mean)
        return mean @ weights["params"]["kernel"], {"mean": mean.mean(0)}

    mesh = make_mesh()
    optimizer = optax.adam(1e-3)
    weights = {"params": {"kernel": jnp.ones((3, 3))}, "batch_stats": {"mean": jnp.zeros(3)}}
    state = step_module.new_state(weights, optimizer, 0.9)
    step = step_module.make_train_step(apply, optimizer, lambda _: 1e-3, settings, mesh)
    images = np.zeros((16, 32, 32, 3), np.uint8)
    images[9] = 255
    batch = {"image": images, "label": np.zeros(16, np.int32)}
    before = jax.device_get(state)
    state, metrics = step(state, to_devices(batch, mesh))
    assert metrics["non_finite"] == 0
    after = jax.device_get(state)
    assert (before.pop("step"), after.pop("step")) == (0, 1)
    jax.tree.map(np.testing.assert_array_equal, after, before)
    fine, metrics = step(state, to_devices(batch | {"image": 0 * images}, mesh))
    assert metrics["non_finite"] == -1
    assert not np.array_equal(fine["params"]["kernel"], before["params"]["kernel"])


def test_stopping_reports_step_parameter_and_images(starts, tmp_path):
    with pytest.raises(TrainingError) as error:
        toy.train(toy.get_config(), tmp_path)
    said = str(error.value)
    assert "at step 5 the loss is nan and the gradient norm nan, first in the gradient of " in said
    assert f"Last checkpoint: {tmp_path}/checkpoints/3." in said
    assert "--config.on_non_finite=skip or roll_back" in said
    report = json.loads((tmp_path / "non_finite.json").read_text())
    assert (report["step"], report["batch"]) == (5, 4)
    assert report["mishaps"] == {"skipped": 0, "rolled_back": 0, "batches_left_out": 0}
    assert len(report["images"]) == 22  # of 64 rows, each image three times
    assert report["parameter"] in said
    assert "python" in report["command"]
    assert Checkpoints(tmp_path / "checkpoints").steps() == [3]


def test_skipping_counts_and_is_bounded(starts, tmp_path, caplog):
    assert toy.train(toy.get_config(on_non_finite="skip"), tmp_path) == 0
    assert "at step 5 the loss is nan" in caplog.text
    assert "skipped, number 1" in caplog.text
    last = read_metrics(tmp_path / "metrics.jsonl")[-2]
    assert (last["train/skipped"], last["train/rolled_back"]) == (1, 0)
    assert Checkpoints(tmp_path / "checkpoints").restore().meta["mishaps"] == [1, 0, 0]
    with pytest.raises(TrainingError, match=r"on_non_finite=skip, --config.non_finite_limit=0\)"):
        toy.train(toy.get_config(on_non_finite="skip", non_finite_limit=0), tmp_path / "none")


def test_rolling_back_leaves_the_batch_out(starts, tmp_path):
    assert toy.train(toy.get_config(on_non_finite="roll_back"), tmp_path) == 0
    # From the checkpoint of step 3 on, with the batch behind number 4.
    assert starts == [0, 5]
    step, arrays, meta = Checkpoints(tmp_path / "checkpoints").restore()
    assert step == 10
    assert meta["mishaps"] == [0, 1, 2]
    assert all(np.isfinite(array).all() for array in arrays.values())
