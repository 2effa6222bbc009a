"""Classification targets and losses, in float32."""

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from hybrid_flax.errors import InputError
from hybrid_flax.settings import Loss
from hybrid_flax.training import token_labels

Outputs = Array | Mapping[str, Array]  # of a model in training
Targets = Array | Mapping[str, Array]  # [B, classes], or label maps and crops


def smoothed_one_hot(
    labels: Int[Array, "B"], num_classes: int, smoothing: float
) -> Float[Array, "B classes"]:
    """smoothing/num_classes everywhere, and 1 - smoothing more at the label."""
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return one_hot * (1 - smoothing) + smoothing / num_classes


def cross_entropy(
    logits: Float[Array, "*B classes"], targets: Float[Array, "*B classes"]
) -> Float[Array, "*B"]:
    """-Σ targets·log softmax(logits) for each image, in float32."""
    return -jnp.sum(targets * jax.nn.log_softmax(logits.astype(jnp.float32)), axis=-1)


def gramian(
    head_logits: Float[Array, "heads B classes"],
    targets: Float[Array, "B classes"],
    diversity: float,
) -> Float[Array, ""]:
    """Loss of several heads that are to disagree (arXiv:2310.16483).

    Summed over the heads: binary cross entropy with the targets, plus `diversity` times the
    divergence of the head's softmax from that of the mean head, through which no gradient flows.
    Both are means over images and classes. A negative `diversity` drives the heads apart.
    """
    head_logits = head_logits.astype(jnp.float32)
    mean_head = jax.nn.log_softmax(jax.lax.stop_gradient(head_logits.mean(0, keepdims=True)))
    divergence = jnp.exp(mean_head) * (mean_head - jax.nn.log_softmax(head_logits))
    fit = optax.sigmoid_binary_cross_entropy(
        head_logits, jnp.broadcast_to(targets, head_logits.shape)
    )
    return jnp.sum(jnp.mean(fit + diversity * divergence, axis=(1, 2)))


def token_labelling(
    outputs: Mapping[str, Array],
    targets: Float[Array, "B classes"],
    token_targets: Float[Array, "B tokens classes"],
    dense_weight: float,
) -> Float[Array, ""]:
    """Token labelling with MixToken (arXiv:2104.10858, section 3): class loss and token loss.

    Args:
      outputs: `logits` [B, classes] of the pooled, mixed maps; `token_logits` [B, tokens, classes],
        each of its own image again; `mixed`, the fraction of the map that came from the image at
        the mirrored position of the batch.
      targets: of the image; mixed here in that proportion.
      token_targets: of each place of the last map, row-major; not mixed.
      dense_weight: of the token loss, a mean over images and tokens.
    """
    targets = (1 - outputs["mixed"]) * targets + outputs["mixed"] * targets[::-1]
    dense = cross_entropy(outputs["token_logits"], token_targets).mean()
    return cross_entropy(outputs["logits"], targets).mean() + dense_weight * dense


def make_loss(config: Loss) -> Callable[[Outputs, Targets], Float[Array, ""]]:
    """Makes the loss `loss(outputs, targets) → scalar` of whatever a model returns in training.

    - Logits [B, classes]: cross entropy.
    - Head logits [heads, B, classes] of the GA models: `gramian`, with `diversity`.
    - A dictionary, of the token-labelled GLNets: `token_labelling`, with `dense_weight`. With label
      maps `targets` is {"label_map": …, "crop": …}, which are cut out as `transposed_crops` says
      (`token_labels.py`); without them every token is taught the label of its image.

    Otherwise `targets` is [B, classes].

    Raises:
      InputError: when called with label maps and outputs that are not for them.
    """

    def loss(outputs: Outputs, targets: Targets) -> Float[Array, ""]:
        if not isinstance(outputs, Mapping):
            if isinstance(targets, Mapping):
                raise InputError(
                    "--config.dataset.label_maps: this model does not use them; take "
                    "configs/glnet_4g_tklb.py or 9g"
                )
            if outputs.ndim == 2:
                return cross_entropy(outputs, targets).mean()
            return gramian(outputs, targets, config.diversity)
        shape = outputs["token_logits"].shape
        if isinstance(targets, Mapping):
            targets, tokens = token_labels.token_targets(
                targets["label_map"],
                targets["crop"],
                num_classes=shape[2],
                grid=(math.isqrt(shape[1]),) * 2,  # images for training are square
                smoothing=config.label_smoothing,
                transposed=config.transposed_crops,
            )
        else:
            tokens = jnp.broadcast_to(targets[:, None], shape)
        return token_labelling(outputs, targets, tokens, config.dense_weight)

    return loss
