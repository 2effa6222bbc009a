"""Blocks in a loop compute what they compute one after the other, in every model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hybrid_flax
from hybrid_flax.models import registry
from hybrid_flax.weights import bridge
from hybrid_flax.weights.functions import as_function, as_training_function
from hybrid_flax.weights.paths import flatten

# One of each kind of block. Loops need several equal ones, and stages without a loop stay in turn.
DEEP = {"depths": (1, 1, 7, 1)}
KINDS = {
    "gcvit_b": DEEP,
    "l2vit_t": DEEP,
    "glnet_4g": DEEP,
    "glnet_4g_tklb": DEEP,
    "glnet_stl": DEEP,
    "unified_convnext_tiny": DEEP,
    "unified_halonet_tiny": DEEP,
    "unified_pvt_tiny": DEEP,
    "unified_swin_tiny": DEEP,
    "unified_internimage_tiny": DEEP,
    "ga_convnext_t": {"depths": (1, 1, 8, 1)},
    "ga_cswin_t": {"depths": (1, 1, 8, 1)},
    "ga_resnet50": {"depths": (1, 1, 8, 1)},
    "ga_vit_s": {"depth": 4},
}


def made(name: str):
    fields = registry.tiny_model(name) | KINDS[name] | {"drop_path": 0.3}
    return hybrid_flax.create_model(name, num_classes=5, rngs=nnx.Rngs(0), **fields)


def loss_and_gradients(model, images, **how):
    weights, apply = bridge.get_weights(model), as_training_function(model, **how)

    def loss(params):
        given = weights | {"params": params}
        outputs, statistics = apply(given, images, train=True, key=jax.random.key(2))
        return sum(jnp.mean(jnp.square(x)) for x in jax.tree.leaves(outputs)), statistics

    found = jax.jit(jax.value_and_grad(loss, has_aux=True))(weights["params"])
    (loss_, statistics), gradients = jax.device_get(found)
    return loss_, flatten(statistics), flatten(gradients)


def check_same(name: str, **how):
    model = made(name)
    images = jax.random.normal(jax.random.key(1), (2, model.image_size, model.image_size, 3))
    want = loss_and_gradients(model, images)
    got = loss_and_gradients(model, images, scan=True, **how)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    assert got[1].keys() == want[1].keys()
    for path, statistic in want[1].items():
        np.testing.assert_allclose(got[1][path], statistic, rtol=1e-5, atol=1e-6, err_msg=path)
    # Gradients of biases before a batch norm are nothing but rounding; over the few values of these
    # small maps a batch norm makes much of it where a channel hardly varies.
    noise = 3e-6 * max(np.abs(x).max() for x in want[2].values())
    assert got[2].keys() == want[2].keys()
    for path, gradient in want[2].items():
        atol = 3e-4 * np.abs(gradient).max() + noise
        np.testing.assert_allclose(got[2][path], gradient, rtol=0, atol=atol, err_msg=path)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_block_has_loops(name):
    model = bridge.abstract(lambda: made(name))
    weights = bridge.get_weights(model)
    images = jax.ShapeDtypeStruct((2, model.image_size, model.image_size, 3), jnp.float32)
    traced = jax.make_jaxpr(as_function(model, scan=True))(weights, images)
    assert any(equation.primitive.name == "scan" for equation in traced.eqns)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "blocks"])
@pytest.mark.parametrize("name", KINDS)
def test_loss_gradients_and_statistics_are_the_same(name, remat):
    check_same(name, remat=remat)
