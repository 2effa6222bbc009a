"""Images changed a little so that a model fails: FGSM and PGD, as textbooks have them.

Pixels run from 0 to 1, changes are within ±ε in every pixel and colour, and no image leaves [0, 1].
The attacks see all of the model, know the label, and raise its cross entropy (untargeted).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hybrid_flax.errors import InputError

Logits = Callable[[Float[Array, "B H W 3"]], Float[Array, "B K"]]


def losses(logits: Float[Array, "B K"], labels: Int[Array, "B"]) -> Float[Array, "B"]:
    """Cross entropy of each image, nats."""
    shares = jax.nn.log_softmax(logits.astype(jnp.float32))
    return -jnp.take_along_axis(shares, labels[:, None], axis=1)[:, 0]


def fgsm(
    logits_of: Logits, pixels: Float[Array, "B H W 3"], labels: Int[Array, "B"], epsilon: float
) -> Float[Array, "B H W 3"]:
    """One step of size ε along the sign of the gradient (arXiv:1412.6572, section 4).

    Args:
      logits_of: of pixels from 0 to 1.
    """
    return _step(logits_of, pixels, pixels, labels, epsilon, epsilon)


def pgd(
    logits_of: Logits,
    pixels: Float[Array, "B H W 3"],
    labels: Int[Array, "B"],
    epsilon: float,
    step: float,
    steps: int,
) -> Float[Array, "B H W 3"]:
    """Steps of FGSM, each followed by the way back into ±ε (arXiv:1706.06083, section 2.1).

    It starts at the image itself, not at a random place around it.

    Raises InputError for less than one step.
    """
    if steps < 1:
        raise InputError(f"steps={steps}: expected 1 or more")

    def once(_, changed):
        return _step(logits_of, changed, pixels, labels, step, epsilon)

    return jax.lax.fori_loop(0, steps, once, pixels)


def _step(logits_of: Logits, changed, pixels, labels, step: float, epsilon: float):
    gradient = jax.grad(lambda x: losses(logits_of(x), labels).sum())(changed)
    changed = changed + step * jnp.sign(gradient)
    changed = jnp.clip(changed, pixels - epsilon, pixels + epsilon)
    return jnp.clip(changed, 0.0, 1.0)
