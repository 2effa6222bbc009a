import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hybrid_flax
from configs import recipes
from hybrid_flax import bridge
from hybrid_flax.training.optimizers import cosine_schedule, decayed, make_optimizer


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
    config = recipes.glnet("glnet_4g").schedule
    schedule = jax.jit(cosine_schedule(config, 2e-3, 625))
    warmup = [float(schedule(step)) for step in (0, 625, 5 * 625)]
    np.testing.assert_allclose(warmup, [0, 4e-4, 2e-3], rtol=1e-5)
    assert float(schedule(152.5 * 625)) == pytest.approx((2e-3 + 1e-5) / 2, rel=1e-5)
    assert float(schedule(300 * 625)) == pytest.approx(1e-5)


def test_a_warm_up_may_reach_the_peak_with_its_last_step():
    config = recipes.l2vit("l2vit_b").schedule
    schedule = jax.jit(cosine_schedule(config, 4e-3, 312))
    peak = [float(schedule(20 * 312 + i)) for i in (-2, -1, 0, 1)]
    np.testing.assert_allclose(peak[1:3], 4e-3, rtol=1e-6)
    assert peak[0] == pytest.approx(4e-3 * 6238 / 6239)
    assert peak[3] < 4e-3


def test_a_rate_may_change_between_epochs_only():
    config = recipes.gramian("ga_convnext_t").schedule
    schedule = jax.jit(cosine_schedule(config, 5e-3, 1251))
    rates = [float(schedule(epoch * 1251 + 700)) for epoch in (0, 1, 2, 299)]
    np.testing.assert_allclose(rates, [1e-6, 1.667e-3, 3.334e-3, 1.137e-6], rtol=1e-3)


def test_the_rate_of_token_labelling_is_an_epoch_late():
    config = recipes.glnet_token_labelling("glnet_4g_tklb").schedule
    schedule = jax.jit(cosine_schedule(config, 2e-3, 625))
    rates = [float(schedule(epoch * 625 + 10)) for epoch in (0, 1, 2, 309)]
    np.testing.assert_allclose(rates[:3], [1e-6, 1e-6, 4.008e-4], rtol=1e-3)
    assert rates[3] == pytest.approx(1.02e-5, rel=1e-2)


def test_a_schedule_that_ends_before_it_begins_is_refused():
    config = recipes.gcvit("gcvit_b", batch_size=4096).schedule
    config.cosine_epochs = 20.0
    with pytest.raises(ValueError, match="cosine_epochs=20.0 ends before the warm-up of 20.0"):
        cosine_schedule(config, 1.0, 100)


def test_decay_follows_the_rank():
    model = bridge.abstract(lambda: hybrid_flax.create_model("gcvit_s"))
    config = recipes.gcvit("gcvit_s", batch_size=1024).optimizer
    flags = bridge.flatten(decayed(bridge.get_weights(model)["params"], config))
    assert flags["stages/0/blocks/0/attn/position_bias"]  # rank 2: decayed, as the authors did
    assert flags["stem/conv/kernel"]
    for path in ("stem/conv/bias", "norm/scale", "stages/1/blocks/0/gamma1", "head/bias"):
        assert not flags[path]


def test_decay_has_exceptions_by_path():
    params = {"a": {"gamma": jnp.ones(3)}, "b": {"table": jnp.ones((2, 2))}, "c": jnp.ones((2, 2))}
    config = recipes.gcvit("gcvit_s", batch_size=1024).optimizer
    config.decay_also, config.decay_never = (r"/gamma$",), (r"^b/",)
    assert bridge.flatten(decayed(params, config)) == {"a/gamma": True, "b/table": False, "c": True}
    config.decay_never = ("gama",)
    with pytest.raises(ValueError, match=r"optimizer\.decay_never: 'gama' matches no parameter"):
        decayed(params, config)


def test_lamb_scales_each_decayed_parameter_by_its_norm():
    config = recipes.gramian("ga_convnext_t").optimizer
    optimizer = make_optimizer(config, lambda step: 0.1)
    params = {"kernel": jnp.full((2, 2), 10.0), "bias": jnp.full(2, 10.0)}
    grads = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1), params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    # The first Adam direction is 1 everywhere; the kernel's becomes as long as the kernel is.
    np.testing.assert_allclose(updates["bias"], -0.1, rtol=1e-5)
    np.testing.assert_allclose(updates["kernel"], -0.1 * 10, rtol=1e-5)


def test_clipping_decay_and_step_size_of_adamw():
    config = recipes.gcvit("gcvit_b", batch_size=4096).optimizer
    optimizer = make_optimizer(config, lambda step: 0.1)
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
