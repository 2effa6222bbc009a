import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import hybrid_flax
from hybrid_flax import layers
from hybrid_flax.costs.flops import count_multiply_adds, training_flops
from hybrid_flax.weights import bridge
from pallas.window_attention import window_attention
from tests.parity import multiply_adds

X = jax.ShapeDtypeStruct((2, 8, 8, 6), jnp.float32)


def test_products_and_convolutions():
    assert count_multiply_adds(jnp.matmul, jnp.ones((3, 4)), jnp.ones((4, 5))) == 3 * 4 * 5
    batched = (jnp.ones((7, 3, 4)), jnp.ones((7, 4, 5)))
    assert count_multiply_adds(jnp.matmul, *batched) == 7 * 3 * 4 * 5
    strided = layers.conv(6, 10, 3, stride=2, rngs=nnx.Rngs(0))
    assert count_multiply_adds(strided, X) == 2 * 4 * 4 * 10 * 9 * 6
    depthwise = layers.DepthwiseConv(6, 3, rngs=nnx.Rngs(0))
    assert count_multiply_adds(depthwise, X) == 2 * 8 * 8 * 6 * 9


def test_loops_count_every_turn():
    def scanned(x):
        return jax.lax.scan(lambda carry, _: (carry @ carry, None), x, length=5)[0]

    assert count_multiply_adds(scanned, jnp.ones((3, 3))) == 5 * 27
    with pytest.raises(ValueError, match="loop of unknown length"):
        count_multiply_adds(
            lambda x: jax.lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ x, x),
            jnp.ones((3, 3)),
        )


@pytest.mark.parametrize("implementation", ["auto", "pallas"])
def test_kernels_count_as_what_they_replace(implementation):
    qkv = jax.ShapeDtypeStruct((2, 14, 14, 3, 4, 32), jnp.float32)

    def attend(qkv):
        return window_attention(qkv, window=7, implementation=implementation)

    assert count_multiply_adds(attend, qkv) == 2 * (2 * 14 * 14) * 49 * (4 * 32)


# What hooks on the official models count (multiply-adds of convolutions and products, in 10⁹).
# Published figures agree, but for XT, T2, S2 and the two large images, which are published higher
# or lower than the models are: 2.6, 5.5, 10.7, 120.4 and 245.0.
COUNTED = {"gcvit_xxt": 2.12, "gcvit_xt": 2.91, "gcvit_s": 8.53, "gcvit_l_384": 103.94}


@pytest.mark.parametrize("name", COUNTED)
def test_models_cost_what_the_official_ones_cost(name):
    assert multiply_adds(name) / 1e9 == pytest.approx(COUNTED[name], abs=0.006)


def test_a_training_step_is_three_forward_passes_of_two_flops():
    model = bridge.abstract(lambda: hybrid_flax.create_model("gcvit_xxt", rngs=nnx.Rngs(0)))
    published = hybrid_flax.model_info("gcvit_xxt").gflops
    assert training_flops(model, 224, batch_size=8) == pytest.approx(6e9 * 8 * published, rel=0.05)
