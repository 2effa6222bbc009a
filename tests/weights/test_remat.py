"""What is computed again in the backward pass changes memory, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import hybrid_flax
from hybrid_flax.weights import bridge
from hybrid_flax.weights.functions import REMAT, as_training_function
from hybrid_flax.weights.paths import flatten


def test_gradients_and_batch_statistics_are_the_same():
    """Of L2ViT, whose blocks hold batch norms."""
    model = hybrid_flax.create_model(
        "l2vit_t",
        num_classes=5,
        image_size=32,
        drop_path=0.2,
        rngs=nnx.Rngs(0),
        dim=32,
        depths=(1, 1, 1, 1),
    )
    weights = bridge.get_weights(model)
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    results = {}
    for remat in REMAT:
        apply = as_training_function(model, remat)

        def loss(params, apply=apply):
            outputs, statistics = apply(
                weights | {"params": params}, images, train=True, key=jax.random.key(2)
            )
            return sum(jnp.mean(jnp.square(x)) for x in jax.tree.leaves(outputs)), statistics

        results[remat] = jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(weights["params"]))
    want = flatten(results["none"])
    # Gradients of biases before a batch norm are nothing but rounding.
    noise = 1e-6 * max(np.abs(x).max() for x in want.values())
    for remat in ("blocks", "dots"):
        for path, got in flatten(results[remat]).items():
            atol = 1e-4 * np.abs(want[path]).max() + noise
            np.testing.assert_allclose(got, want[path], rtol=0, atol=atol, err_msg=path)
