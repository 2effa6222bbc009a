import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import hybrid_flax
from configs import recipes
from hybrid_flax.models.gcvit import GCViT
from hybrid_flax.settings import from_config
from hybrid_flax.training.optimizers import decayed, make_optimizer, trainable
from hybrid_flax.weights import bridge
from hybrid_flax.weights.paths import flatten


def test_decay_follows_the_rank():
    model = bridge.abstract(lambda: hybrid_flax.create_model("gcvit_s"))
    config = from_config(recipes.gcvit("gcvit_s", batch_size=1024)).optimizer
    flags = flatten(decayed(bridge.get_weights(model)["params"], config))
    assert flags["stages/0/blocks/0/attn/position_bias"]  # rank 2: decayed, as the authors did
    assert flags["stem/conv/kernel"]
    for path in ("stem/conv/bias", "norm/scale", "stages/1/blocks/0/gamma1", "head/bias"):
        assert not flags[path]


def test_decay_has_exceptions_by_path():
    params = {"a": {"gamma": jnp.ones(3)}, "b": {"table": jnp.ones((2, 2))}, "c": jnp.ones((2, 2))}
    config = from_config(recipes.gcvit("gcvit_s", batch_size=1024)).optimizer
    config = dataclasses.replace(config, decay_also=(r"/gamma$",), decay_never=(r"^b/",))
    assert flatten(decayed(params, config)) == {"a/gamma": True, "b/table": False, "c": True}
    config = dataclasses.replace(config, decay_never=("gama",))
    with pytest.raises(ValueError, match=r"optimizer\.decay_never: 'gama' matches no parameter"):
        decayed(params, config)


def test_lamb_scales_each_decayed_parameter_by_its_norm():
    config = from_config(recipes.gramian("ga_convnext_t")).optimizer
    optimizer = make_optimizer(config, lambda step: 0.1, GCViT.structure)
    params = {"kernel": jnp.full((2, 2), 10.0), "bias": jnp.full(2, 10.0)}
    grads = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1), params)
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    # The first Adam direction is 1 everywhere; the kernel's becomes as long as the kernel is.
    np.testing.assert_allclose(updates["bias"], -0.1, rtol=1e-5)
    np.testing.assert_allclose(updates["kernel"], -0.1 * 10, rtol=1e-5)


def test_clipping_decay_and_step_size_of_adamw():
    config = from_config(recipes.gcvit("gcvit_b", batch_size=4096)).optimizer
    optimizer = make_optimizer(config, lambda step: 0.1, GCViT.structure)
    params = {"kernel": jnp.full((2, 2), 10.0), "bias": jnp.full(2, 10.0)}
    grads = {"kernel": jnp.full((2, 2), 1e3), "bias": jnp.full(2, 1e3)}
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    # The first Adam step has the size of the learning rate; decay adds 0.1 · 0.05 · 10.
    np.testing.assert_allclose(updates["bias"], -0.1, rtol=1e-5)
    np.testing.assert_allclose(updates["kernel"], -0.1 - 0.05, rtol=1e-5)
    moments = flatten(state)
    (path,) = [path for path in moments if path.endswith("mu/bias")]
    clipped = 1e3 * 5 / np.sqrt(6 * 1e6)  # to a global norm of 5
    np.testing.assert_allclose(moments[path], 0.1 * clipped, rtol=1e-5)


def config_of(**changes):
    config = from_config(recipes.gcvit("gcvit_b", batch_size=4096)).optimizer
    return dataclasses.replace(config, **{"clip_norm": 0.0, **changes})


SHAPES = {"block": {"kernel": (3, 4), "bias": (4,)}, "head": {"kernel": (4, 2), "bias": (2,)}}


def numbers(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32),
        SHAPES,
        is_leaf=lambda shape: isinstance(shape, tuple),
    )


def ours(config, steps=5, rate=0.1):
    """What `steps` updates make of the parameters."""
    optimizer = make_optimizer(config, lambda step: rate, GCViT.structure)
    params = numbers(0)
    state = optimizer.init(params)
    for step in range(steps):
        updates, state = optimizer.update(numbers(1 + step), state, params)
        params = jax.tree.map(jnp.add, params, updates)
    return flatten(params), state


def theirs(make, config, steps=5, rate=0.1, clip=lambda parameters: None):
    """The same by an optimizer of PyTorch; arrays of rank 2 decay. `clip` changes gradients."""
    params = {path: torch.tensor(leaf) for path, leaf in flatten(numbers(0)).items()}
    groups = [
        {"params": [p for p in params.values() if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in params.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = make(groups, lr=rate)
    for step in range(steps):
        for path, gradient in flatten(numbers(1 + step)).items():
            params[path].grad = torch.tensor(gradient)
        clip(params)
        optimizer.step()
    return {path: parameter.numpy() for path, parameter in params.items()}


def assert_same(got, want, rtol=2e-6):
    for path, array in want.items():
        np.testing.assert_allclose(got[path], array, rtol=rtol, atol=1e-6, err_msg=path)


def test_adamw_is_that_of_pytorch():
    config = config_of()
    assert_same(ours(config)[0], theirs(torch.optim.AdamW, config))
    # After one step the bias corrections are what is left: PyTorch computes them in float64.
    config = dataclasses.replace(config, weight_decay=0.0)
    first = ours(config, steps=1, rate=1.0)[0]["block/kernel"] - numbers(0)["block"]["kernel"]
    np.testing.assert_allclose(np.abs(first), 1, rtol=5e-7)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_that_of_pytorch(nesterov):
    config = config_of(name="sgd", momentum=0.8, nesterov=nesterov)

    def make(groups, lr):
        return torch.optim.SGD(groups, lr, momentum=0.8, nesterov=nesterov)

    assert_same(ours(config)[0], theirs(make, config))


def test_lion_goes_by_signs():
    config = config_of(name="lion", b2=0.99, weight_decay=0.5)
    (first, second), start = (flatten(numbers(seed)) for seed in (1, 2)), numbers(0)
    got, _ = ours(config, steps=2)
    bias = start["block"]["bias"] - 0.1 * np.sign(first["block/bias"])
    momentum = 0.01 * first["block/bias"]
    bias -= 0.1 * np.sign(0.9 * momentum + 0.1 * second["block/bias"])
    np.testing.assert_allclose(got["block/bias"], bias, rtol=1e-6)
    got, _ = ours(config, steps=1)
    kernel = start["block"]["kernel"]
    np.testing.assert_allclose(
        got["block/kernel"],
        kernel - 0.1 * (np.sign(first["block/kernel"]) + 0.5 * kernel),
        rtol=1e-5,
        atol=1e-6,
    )


def test_adafactor_steps_by_the_size_of_the_parameter():
    config = config_of(name="adafactor", weight_decay=0.0)
    got, state = ours(config, steps=1)
    start = numbers(0)["block"]["kernel"]
    # The first step: gradient over its own size, times the parameter's root mean square.
    want = start - 0.1 * np.sign(numbers(1)["block"]["kernel"]) * np.sqrt(np.mean(start**2))
    np.testing.assert_allclose(got["block/kernel"], want, rtol=1e-5, atol=1e-6)
    # Large matrices keep a row and a column: 300 + 200 numbers for 60,000.
    optimizer = make_optimizer(config, lambda step: 0.1, GCViT.structure)
    state = optimizer.init({"kernel": jnp.zeros((300, 200))})
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 600


def test_every_kind_of_clipping():
    norm, value = config_of(clip_norm=0.5), config_of(clip_value=0.3)

    def by_norm(params):
        torch.nn.utils.clip_grad_norm_(list(params.values()), 0.5)

    def by_value(params):
        torch.nn.utils.clip_grad_value_(list(params.values()), 0.3)

    for config, clip in ((norm, by_norm), (value, by_value)):
        config = dataclasses.replace(config, name="sgd", momentum=0.0)
        assert_same(ours(config)[0], theirs(torch.optim.SGD, config, clip=clip))


def test_adaptive_clipping_goes_by_units_and_skips_the_head():
    config = config_of(name="sgd", momentum=0.0, weight_decay=0.0, clip_adaptive=0.01)
    got, _ = ours(config, steps=1, rate=1.0)
    for path, start in flatten(numbers(0)).items():
        gradient = flatten(numbers(1))[path]
        if path.startswith("block"):  # arXiv:2102.06171, equation 3: an output's weights together
            bound = 0.01 * np.maximum(np.linalg.norm(start, axis=0), 1e-3)
            gradient = gradient * np.minimum(1, bound / np.linalg.norm(gradient, axis=0))
        np.testing.assert_allclose(got[path], start - gradient, rtol=1e-5, atol=1e-6, err_msg=path)


def test_what_is_frozen_neither_moves_nor_decays_nor_costs_memory():
    config = config_of(freeze=(r"^(?!head/)",), clip_norm=0.5, layer_decay=0.5)
    params = {"stages": {"0": {"blocks": {"0": numbers(0)["block"]}}}, "head": numbers(0)["head"]}
    grads = {"stages": {"0": {"blocks": {"0": numbers(1)["block"]}}}, "head": numbers(1)["head"]}
    optimizer = make_optimizer(config, lambda step: 0.1, GCViT.structure)
    state = optimizer.init(params)
    assert {leaf.shape for leaf in jax.tree.leaves(state)} == {(), (4, 2), (2,)}
    updates, _ = optimizer.update(grads, state, params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(updates["stages"]))
    # Alone it would get the same: the frozen gradients are not in the norm.
    alone = make_optimizer(config_of(clip_norm=0.5), lambda step: 0.1, GCViT.structure)
    head = {"head": params["head"]}
    want, _ = alone.update({"head": grads["head"]}, alone.init(head), head)
    assert_same(flatten(updates["head"]), flatten(want["head"]))


def test_unusable_freezing_is_refused():
    with pytest.raises(ValueError, match=r"optimizer\.freeze: 'haed' matches no parameter"):
        trainable(numbers(0), config_of(freeze=("^head", "haed")))
    with pytest.raises(ValueError, match=r"freeze=\('.',\) leaves no parameter to train"):
        make_optimizer(config_of(freeze=(".",)), lambda step: 0.1, GCViT.structure).init(numbers(0))


def test_the_rate_falls_with_the_distance_from_the_head():
    config = config_of(layer_decay=0.5, weight_decay=0.1)
    block = numbers(0)["block"]
    params = {
        "stem": {"conv": block},
        "stages": {"0": {"blocks": {"0": block, "1": block}}},
        "head": block,
    }
    optimizer = make_optimizer(config, lambda step: 0.1, GCViT.structure)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    flat = flatten(updates)
    head = flat["head/kernel"]  # decay included: it belongs to the rate
    np.testing.assert_allclose(flat["stages/0/blocks/1/kernel"], head / 2, rtol=1e-6)
    np.testing.assert_allclose(flat["stages/0/blocks/0/kernel"], head / 4, rtol=1e-6)
    np.testing.assert_allclose(flat["stem/conv/kernel"], head / 8, rtol=1e-6)
