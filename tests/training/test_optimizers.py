import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import hybrid_flax
from configs import recipes
from hybrid_flax import bridge
from hybrid_flax.training.optimizers import adamw, cosine_schedule, decayed


def test_the_schedule_of_gcvit():
    config = recipes.gcvit("gcvit_b", batch_size=4096)
    schedule = jax.jit(cosine_schedule(config.schedule, 5e-3, 312))

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
    config = ConfigDict(
        {
            "warmup_epochs": 2,
            "warmup_learning_rate": 0.0,
            "min_learning_rate": 0.0,
            "cosine_epochs": 10,
            "cosine_from_start": False,
        }
    )
    schedule = cosine_schedule(config, 1.0, 5)
    values = [float(schedule(step)) for step in range(51)]
    np.testing.assert_allclose(values[:11], np.linspace(0, 1, 11), atol=1e-6)
    assert values[30] == pytest.approx(0.5)
    assert values[50] == pytest.approx(0, abs=1e-7)
    assert (np.diff(values[10:]) < 0).all()


def test_a_schedule_that_ends_before_it_begins_is_refused():
    config = recipes.gcvit("gcvit_b", batch_size=4096).schedule
    config.cosine_epochs = 20.0
    with pytest.raises(ValueError, match="cosine_epochs=20.0 ends before the warm-up of 20.0"):
        cosine_schedule(config, 1.0, 100)


def test_decay_follows_the_rank():
    model = bridge.abstract(lambda: hybrid_flax.create_model("gcvit_s"))
    flags = bridge.flatten(decayed(bridge.get_params(model)))
    assert flags["stages/0/blocks/0/attn/position_bias"]  # rank 2: decayed, as the authors did
    assert flags["stem/conv/kernel"]
    for path in ("stem/conv/bias", "norm/scale", "stages/1/blocks/0/gamma1", "head/bias"):
        assert not flags[path]


def test_clipping_decay_and_step_size_of_adamw():
    config = recipes.gcvit("gcvit_b", batch_size=4096).optimizer
    optimizer = adamw(config, lambda step: 0.1)
    params = {"kernel": jnp.full((2, 2), 10.0), "bias": jnp.full(2, 10.0)}
    grads = {"kernel": jnp.full((2, 2), 1e3), "bias": jnp.full(2, 1e3)}
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    # The first Adam step has the size of the learning rate; decay adds 0.1 · 0.05 · 10.
    np.testing.assert_allclose(updates["bias"], -0.1, rtol=1e-5)
    np.testing.assert_allclose(updates["kernel"], -0.1 - 0.05, rtol=1e-5)
    moments = bridge.flatten(state)
    (path,) = [path for path in moments if path.endswith("mu/bias")]
    clipped = 1e3 * 5 / np.sqrt(6 * 1e6)  # to a global norm of 5
    np.testing.assert_allclose(moments[path], 0.1 * clipped, rtol=1e-5)
