import dataclasses

import jax
import numpy as np
import pytest

from configs import recipes
from hybrid_flax.settings import Optimizer, from_config
from hybrid_flax.settings.sections import SCHEDULES
from hybrid_flax.training.schedules import make_schedule, peak_learning_rate


def test_the_schedule_of_gcvit():
    config = from_config(recipes.gcvit("gcvit_b", batch_size=4096))
    schedule = jax.jit(make_schedule(config.schedule, 5e-3, 312))

    def at(epoch):
        return float(schedule(epoch * 312))

    assert at(0) == pytest.approx(1e-6)
    assert at(10) == pytest.approx(1e-6 + (5e-3 - 1e-6) / 2)
    assert float(schedule(20 * 312 - 1)) == pytest.approx(4.999e-3, abs=1e-6)
    # The cosine runs from the start of training, so that it has begun when the warm-up ends.
    assert at(20) == pytest.approx(4.949e-3, abs=1e-6)
    assert at(155) == pytest.approx((5e-3 + 5e-6) / 2, rel=1e-5)
    assert at(310) == pytest.approx(5e-6)
    assert at(320) == pytest.approx(5e-6)


def test_a_cosine_after_the_warm_up_begins_at_the_peak():
    config = from_config(recipes.glnet("glnet_4g")).schedule
    schedule = jax.jit(make_schedule(config, 2e-3, 625))
    warmup = [float(schedule(step)) for step in (0, 625, 5 * 625)]
    np.testing.assert_allclose(warmup, [0, 4e-4, 2e-3], rtol=1e-5)
    assert float(schedule(152.5 * 625)) == pytest.approx((2e-3 + 1e-5) / 2, rel=1e-5)
    assert float(schedule(300 * 625)) == pytest.approx(1e-5)


def test_a_warm_up_may_reach_the_peak_with_its_last_step():
    config = from_config(recipes.l2vit("l2vit_b")).schedule
    schedule = jax.jit(make_schedule(config, 4e-3, 312))
    peak = [float(schedule(20 * 312 + i)) for i in (-2, -1, 0, 1)]
    np.testing.assert_allclose(peak[1:3], 4e-3, rtol=1e-6)
    assert peak[0] == pytest.approx(4e-3 * 6238 / 6239)
    assert peak[3] < 4e-3


def test_a_rate_may_change_between_epochs_only():
    config = from_config(recipes.gramian("ga_convnext_t")).schedule
    schedule = jax.jit(make_schedule(config, 5e-3, 1251))
    rates = [float(schedule(epoch * 1251 + 700)) for epoch in (0, 1, 2, 299)]
    np.testing.assert_allclose(rates, [1e-6, 1.667e-3, 3.334e-3, 1.137e-6], rtol=1e-3)


def test_the_rate_of_token_labelling_is_an_epoch_late():
    config = from_config(recipes.glnet_token_labelling("glnet_4g_tklb")).schedule
    schedule = jax.jit(make_schedule(config, 2e-3, 625))
    rates = [float(schedule(epoch * 625 + 10)) for epoch in (0, 1, 2, 309)]
    np.testing.assert_allclose(rates[:3], [1e-6, 1e-6, 4.008e-4], rtol=1e-3)
    assert rates[3] == pytest.approx(1.02e-5, rel=1e-2)


def test_a_schedule_that_ends_before_it_begins_is_refused():
    config = from_config(recipes.gcvit("gcvit_b", batch_size=4096)).schedule
    config = dataclasses.replace(config, decay_epochs=20.0)
    with pytest.raises(ValueError, match="decay_epochs=20.0 ends before the warm-up of 20.0"):
        make_schedule(config, 1.0, 100)


def rates(epochs, **changes):
    """At these epochs, of 10 steps each, of a schedule that goes from 1 to 0.1 in 10 epochs."""
    config = from_config(recipes.l2vit("l2vit_b")).schedule
    changes = {"warmup_epochs": 2.0, "warmup_reaches_peak": False} | changes
    config = dataclasses.replace(config, decay_epochs=10.0, min_learning_rate=0.1, **changes)
    schedule = jax.jit(make_schedule(config, 1.0, 10))
    return [round(float(schedule(round(epoch * 10))), 6) for epoch in epochs]


def test_other_ways_down():
    epochs = (0, 1, 2, 6, 10, 12)
    assert rates(epochs, name="cosine") == [0, 0.5, 1, 0.55, 0.1, 0.1]
    assert rates(epochs, name="linear") == [0, 0.5, 1, 0.55, 0.1, 0.1]
    assert rates((4, 8), name="linear") == [0.775, 0.325]
    assert rates(epochs, name="constant") == [0, 0.5, 1, 1, 1, 1]
    assert rates((1, 2, 3.9, 4, 6), name="step", step_epochs=2.0, step_factor=0.5) == [
        *(0.5, 1, 1),
        *(0.5, 0.25),
    ]
    assert rates((30,), name="step", step_epochs=2.0, step_factor=0.5) == [0.1]
    # Drops of PyTorch's StepLR are counted from the start; here, too, if asked.
    assert rates((2, 4), name="step", step_epochs=2.0, decay_from_start=True) == [0.1, 0.1]


def test_one_cycle_as_l2vit_offers_it():
    epochs = (0, 2, 4, 6, 8, 9, 10, 11)
    got = rates(epochs, name="onecycle", warmup_epochs=0.0)
    assert got == [0, 0.5, 1, 0.525, 0.05, 0.025, 0, 0]
    with pytest.raises(ValueError, match="onecycle rises for 40 % .* in place of 2.0"):
        rates(epochs, name="onecycle")


def test_the_rate_scales_with_the_batch_only_if_asked():
    assert peak_learning_rate(Optimizer(learning_rate=5e-3), 64) == 5e-3
    asked = Optimizer(learning_rate=5e-3, learning_rate_for_batch=512)
    assert peak_learning_rate(asked, 64) == 5e-3 / 8
    # GLNet's rule where its rate is left empty, and what its README gives for 2048 images.
    glnet = Optimizer(learning_rate=2.5e-4, learning_rate_for_batch=256)
    assert peak_learning_rate(glnet, 2048) == 2e-3


def test_every_name_has_a_shape_of_its_own():
    config = from_config(recipes.l2vit("l2vit_t")).schedule
    config = dataclasses.replace(config, warmup_epochs=0.0)
    curves = {}
    for name in SCHEDULES:
        schedule = jax.jit(make_schedule(dataclasses.replace(config, name=name), 1.0, 1))
        curves[name] = tuple(float(schedule(epoch)) for epoch in (40, 150, 290))
    assert len(set(curves.values())) == len(SCHEDULES)
    with pytest.raises(ValueError, match=r"schedule.name='square' has no shape in make_schedule"):
        make_schedule(dataclasses.replace(config, name="square"), 1.0, 1)(0)
