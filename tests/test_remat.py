"""What is computed again in the backward pass changes memory, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hybrid_flax
from hybrid_flax import bridge

TINY = {
    "gcvit_xxt": {"dim": 16, "depths": (2, 1, 1, 1)},
    "l2vit_t": {"dim": 32, "depths": (2, 1, 1, 1)},  # batch norms inside its blocks
    "ga_cswin_t": {"depths": (1, 1, 2, 1), "dim": 32, "taps": 1, "gram_dim": 16, "heads": 1},
}


@pytest.mark.parametrize("name", TINY)
def test_gradients_and_batch_statistics_are_the_same(name):
    size = 224 if name == "ga_cswin_t" else 64
    model = hybrid_flax.create_model(
        name, num_classes=5, image_size=size, drop_path=0.2, rngs=nnx.Rngs(0), **TINY[name]
    )
    weights = bridge.get_weights(model)
    images = jax.random.normal(jax.random.key(1), (2, size, size, 3))
    results, remats = {}, {}
    for remat in bridge.REMAT:
        apply = bridge.as_training_function(model, remat)

        def loss(params, apply=apply):
            outputs, statistics = apply(
                weights | {"params": params}, images, train=True, key=jax.random.key(2)
            )
            return sum(jnp.mean(jnp.square(x)) for x in jax.tree.leaves(outputs)), statistics

        graded = jax.jit(jax.grad(loss, has_aux=True))
        traced = graded.trace(weights["params"])
        remats[remat] = str(traced.jaxpr).count("prevent_cse=True")
        results[remat] = jax.device_get(graded(weights["params"]))
    assert remats["none"] == 0
    assert remats["blocks"] == remats["dots"] >= 4
    want = bridge.flatten(results["none"])
    for remat in ("blocks", "dots"):
        for path, got in bridge.flatten(results[remat]).items():
            scale = np.abs(want[path]).max() + 1e-6
            np.testing.assert_allclose(got / scale, want[path] / scale, atol=1e-4, err_msg=path)
