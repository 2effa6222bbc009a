"""Classification targets and losses, in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def smoothed_one_hot(
    labels: Int[Array, "B"], num_classes: int, smoothing: float
) -> Float[Array, "B classes"]:
    """smoothing/num_classes everywhere, and 1 - smoothing more at the label."""
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return one_hot * (1 - smoothing) + smoothing / num_classes


def cross_entropy(
    logits: Float[Array, "B classes"], targets: Float[Array, "B classes"]
) -> Float[Array, "B"]:
    """-Σ targets·log softmax(logits) for each image, in float32."""
    return -jnp.sum(targets * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)
