"""The part of augmentation that runs on the device, on whole batches: mixup, cutmix, erasing."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


def normalise(
    images: UInt8[Array, "B H W 3"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "B H W 3"]:
    """uint8 pixels to float32 with the dataset's mean and deviation (both for values in 0..1)."""
    mean, std = (jnp.asarray(x, jnp.float32)[None, None, None] for x in (mean, std))
    return (images.astype(jnp.float32) / 255 - mean) / std


def mix(
    key: jax.Array,
    images: Float[Array, "B H W 3"],
    targets: Float[Array, "B classes"],
    *,
    mixup_alpha: float,
    cutmix_alpha: float,
    cutmix_probability: float,
) -> tuple[Float[Array, "B H W 3"], Float[Array, "B classes"]]:
    """Mixup (arXiv:1710.09412) or cutmix (arXiv:1905.04899) with the batch in reverse order.

    One coin decides for the whole batch, with one λ ~ Beta(α, α) and one box. Cutmix takes a box of
    area 1 - λ around a uniform centre, and λ is corrected to what of it lies inside the image.

    Args:
      mixup_alpha: 0 switches mixup off.
      cutmix_alpha: 0 switches cutmix off.
      cutmix_probability: of cutmix, where both are on.
    """
    if mixup_alpha == 0 and cutmix_alpha == 0:
        return images, targets
    if mixup_alpha == 0 or cutmix_alpha == 0:
        cutmix_probability = 0.0 if cutmix_alpha == 0 else 1.0
    coin_key, lambda_key, box_key = jax.random.split(key, 3)
    use_cutmix = jax.random.bernoulli(coin_key, cutmix_probability)
    alpha = jnp.where(use_cutmix, jnp.float32(cutmix_alpha), jnp.float32(mixup_alpha))
    share = jax.random.beta(lambda_key, alpha, alpha)  # λ: what stays of each image

    box = _random_box(box_key, images.shape[1:3], share)
    share = jnp.where(use_cutmix, 1 - box.mean(dtype=jnp.float32), share)
    weight = jnp.where(use_cutmix, 1 - box.astype(jnp.float32)[None, :, :, None], share)
    mixed = images * weight + images[::-1] * (1 - weight)
    return mixed, targets * share + targets[::-1] * (1 - share)


def _random_box(key: jax.Array, size: tuple[int, int], share: Float[Array, ""]):
    """bool [H, W]: True in a box of area (1 - share)·H·W, clipped by the image."""
    part = jnp.sqrt(1 - share)
    inside = []
    for axis_key, length in zip(jax.random.split(key), size, strict=True):
        half = jnp.floor(length * part).astype(jnp.int32) // 2
        centre = jax.random.randint(axis_key, (), 0, length)
        place = jnp.arange(length)
        inside.append((place >= centre - half) & (place < centre + half))
    return inside[0][:, None] & inside[1][None, :]


def random_erasing(
    key: jax.Array, images: Float[Array, "B H W 3"], probability: float
) -> Float[Array, "B H W 3"]:
    """Random erasing (arXiv:1708.04896) with per-pixel normal noise, on normalised images.

    Each image, with the given probability, loses one rectangle of 2 % to a third of its area and
    an aspect ratio log-uniform in 0.3 to 1/0.3: the first of ten draws that fits.
    """
    if probability == 0:
        return images
    batch, height, width, _ = images.shape
    coin_key, shape_key, place_key, noise_key = jax.random.split(key, 4)

    area_key, aspect_key = jax.random.split(shape_key)
    area = height * width * jax.random.uniform(area_key, (batch, 10), minval=0.02, maxval=1 / 3)
    aspect = jnp.exp(
        jax.random.uniform(aspect_key, (batch, 10), minval=jnp.log(0.3), maxval=-jnp.log(0.3))
    )
    tall, wide = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
    fits = (tall < height) & (wide < width)
    first = jnp.argmax(fits, axis=1)[:, None]
    erase = jax.random.bernoulli(coin_key, probability, (batch,)) & fits.any(axis=1)

    top_left = jax.random.uniform(place_key, (batch, 2))
    inside = []
    for axis, (sides, length) in enumerate(((tall, height), (wide, width))):
        side = jnp.take_along_axis(sides, first, axis=1)
        start = jnp.floor(top_left[:, axis : axis + 1] * (length - side + 1))
        place = jnp.arange(length, dtype=jnp.float32)[None, :]
        inside.append((place >= start) & (place < start + side))
    erased = inside[0][:, :, None] & inside[1][:, None, :] & erase[:, None, None]
    noise = jax.random.normal(noise_key, images.shape, images.dtype)
    return jnp.where(erased[..., None], noise, images)
