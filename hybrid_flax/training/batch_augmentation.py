"""The part of augmentation that runs on the device, on whole batches: mixup, cutmix, erasing."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from hybrid_flax.errors import InputError


def normalise(
    images: UInt8[Array, "B H W 3"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "B H W 3"]:
    """Normalises uint8 pixels by the dataset's mean and deviation, both for values in 0..1."""
    mean_of_pixel, std_of_pixel = (
        jnp.asarray(x, jnp.float32)[None, None, None] for x in (mean, std)
    )
    return (images.astype(jnp.float32) / 255 - mean_of_pixel) / std_of_pixel


def mix(
    key: jax.Array,
    images: UInt8[Array, "B H W 3"] | Float[Array, "B H W 3"],
    targets: Float[Array, "B classes"],
    *,
    mixup_alpha: float,
    cutmix_alpha: float,
    cutmix_probability: float,
    probability: float | Float[Array, ""] = 1.0,
    group: int = 0,
) -> tuple[UInt8[Array, "B H W 3"] | Float[Array, "B H W 3"], Float[Array, "B classes"]]:
    """Mixup (arXiv:1710.09412) or cutmix (arXiv:1905.04899) with the group in reverse order.

    Coins decide for a whole group, with one λ ~ Beta(α, α) and one box. Cutmix takes a box of area
    1 - λ around a uniform centre, and λ is corrected to what of it lies inside the image. Pixels of
    uint8 images are rounded (halves to even), as where timm mixes while it collates.

    Args:
      mixup_alpha: 0 switches mixup off.
      cutmix_alpha: 0 switches cutmix off.
      cutmix_probability: of cutmix, where both are on.
      probability: of mixing at all.
      group: each `group` images in a row draw for themselves; 0, or more than there are: the whole
        batch. Where each device holds whole groups, no image leaves its device.

    Raises:
      InputError: the batch is not a multiple of the group.
    """
    if mixup_alpha == 0 and cutmix_alpha == 0:
        return images, targets
    if mixup_alpha == 0 or cutmix_alpha == 0:
        cutmix_probability = 0.0 if cutmix_alpha == 0 else 1.0
    batch, height, width, _ = images.shape
    group = min(group, batch) or batch
    if batch % group:
        raise InputError(f"{batch} images cannot be mixed in groups of {group}")
    groups = batch // group

    mix_key, coin_key, lambda_key, box_key = jax.random.split(key, 4)
    use_cutmix = jax.random.bernoulli(coin_key, cutmix_probability, (groups,))
    alpha = jnp.where(use_cutmix, jnp.float32(cutmix_alpha), jnp.float32(mixup_alpha))
    share = jax.random.beta(lambda_key, alpha, alpha)  # λ: what stays of each image
    is_mixed = jax.random.bernoulli(mix_key, probability, (groups,))
    share = jnp.where(is_mixed, share, 1)
    rows, columns = _random_box(box_key, (height, width), share)
    area = rows.sum(1, dtype=jnp.float32) * columns.sum(1, dtype=jnp.float32)
    share = jnp.where(use_cutmix, 1 - area / (height * width), share)

    def each(values):  # a value of every group, for all of its images
        shape = (groups, group, *values.shape[1:])
        return jnp.broadcast_to(values[:, None], shape).reshape(batch, *values.shape[1:])

    inside = each(rows)[:, :, None, None] & each(columns)[:, None, :, None]
    of_pixel = jnp.where(
        each(use_cutmix)[:, None, None, None],
        1 - inside.astype(jnp.float32),
        each(share)[:, None, None, None],
    )
    of_target = each(share)[:, None]
    partners = _reversed(images, group).astype(jnp.float32)
    mixed = images.astype(jnp.float32) * of_pixel + partners * (1 - of_pixel)
    if images.dtype == jnp.uint8:
        mixed = jnp.round(mixed).astype(jnp.uint8)
    return mixed, targets * of_target + _reversed(targets, group) * (1 - of_target)


def _reversed(values, group: int):
    """Reverses the order of each `group` rows."""
    if group == len(values):
        return values[::-1]
    return values.reshape(-1, group, *values.shape[1:])[:, ::-1].reshape(values.shape)


def _random_box(key: jax.Array, size: tuple[int, int], share: Float[Array, " groups"]):
    """Draws boxes of area (1 - share)·H·W as rows bool [groups, H] and columns [groups, W]."""
    part = jnp.sqrt(1 - share)[:, None]
    inside = []
    for axis_key, length in zip(jax.random.split(key), size, strict=True):
        # The same half on both sides, as in the papers' timm 0.4 to 0.9; 1.0 rounds one of them up.
        half = jnp.floor(length * part).astype(jnp.int32) // 2
        centre = jax.random.randint(axis_key, half.shape, 0, length)
        place = jnp.arange(length)[None, :]
        inside.append((place >= centre - half) & (place < centre + half))
    return inside


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
    return jnp.where(erased[..., None], cheap_normal(noise_key, images.shape), images)


def cheap_normal(key: jax.Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Draws normal numbers, float32, each a function of the key and its place alone.

    Threefry for every pixel would cost more than all of the rest of a batch's augmentation; a hash
    of 32 bits (two rounds of multiply and shift, a word of the key before each) is as good for
    noise, and XLA makes one loop of it and what it is used in.
    """
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    place = sum(
        jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        for axis, stride in enumerate(strides)
    )
    bits = _scrambled(_scrambled(place ^ first) ^ second)
    # The middle of one of 2²⁴ equal parts of (-1, 1), so that neither end is drawn.
    uniform = (bits >> 8).astype(jnp.float32) * 2.0**-23 - (1 - 2.0**-24)
    return math.sqrt(2) * jax.lax.erf_inv(uniform)


def _scrambled(bits):
    """Permutes all 32-bit numbers so that every bit depends on every other."""
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)
