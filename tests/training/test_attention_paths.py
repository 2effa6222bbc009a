"""Whole training steps with the kernels, interpreted, and with XLA, on the digits."""

import itertools

import numpy as np
import pytest

from pallas.dispatch import recorded
from pallas.tiles import tpu as tpu_tiles
from tests.training.digits import prepare

STEPS = 5


@pytest.fixture(autouse=True)
def one_window_at_a_time(monkeypatch):
    """In the schedule: it compiles faster."""
    monkeypatch.setattr(tpu_tiles, "UNROLLED_TOKENS", 1)


NAMES = [pytest.param("gcvit_xxt", marks=pytest.mark.slow), "unified_swin_micro"]


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_is_to_have_kernels_has_them(name):
    with recorded() as calls:
        step, state, batches = prepare(name, 2, model__implementation="pallas")
        step.trace(state, next(batches))
    assert {choices["cpu"].kernel for _, choices in calls} == {"tpu interpreted"}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_curve_is_the_same_on_every_path(name):
    curves = {}
    for implementation in ("pallas", "xla"):
        changes = {"model__implementation": implementation, "optimizer__learning_rate": 1e-3}
        with recorded() as calls:
            step, state, batches = prepare(name, 2, **changes)
            step.trace(state, next(batches))
        kernels = {choices["cpu"].kernel for _, choices in calls}
        assert kernels == {"tpu interpreted" if implementation == "pallas" else None}
        losses = curves[implementation] = []
        for batch in itertools.islice(batches, STEPS):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(curves["pallas"], curves["xla"], rtol=1e-5)
    assert len(set(curves["xla"])) == STEPS


@pytest.mark.slow
def test_a_step_on_eight_devices_gathers_no_batch():
    step, state, batches = prepare("gcvit_xxt", 8, devices=8, model__implementation="pallas")
    text = step.lower(state, next(batches)).compile().as_text()
    assert "all-reduce" in text  # of the gradients
    assert "all-gather" not in text
    assert "all-to-all" not in text
