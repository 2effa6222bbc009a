"""Norms whose statistics are float32 whatever the dtype of the computation."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from hybrid_flax.errors import InputError


def layer_norm(
    dim: int, *, epsilon: float = 1e-5, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
) -> nnx.LayerNorm:
    """Over the last axis; the two-pass variance, as PyTorch computes it."""
    return nnx.LayerNorm(dim, epsilon=epsilon, use_fast_variance=False, dtype=dtype, rngs=rngs)


class BatchNorm(nnx.Module):
    """Batch normalisation over all axes but the last, as PyTorch has it; [B, ..., C] → the same.

    In training the batch's own mean and variance are used, and the running ones move a tenth of the
    way towards them; the running variance takes the unbiased estimate (n/(n - 1)). Under `jit` over
    several devices the batch is the global one.

    With `group` (see `group_batch_norms`) each `group` images in a row are normalised by their own
    statistics, as if on a GPU of their own, and the running ones move towards the mean over groups.
    A batch of fewer images is one group.
    """

    def __init__(self, dim: int, *, epsilon: float = 1e-5, dtype: DTypeLike = jnp.float32):
        self.scale = nnx.Param(jnp.ones(dim, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(dim, jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros(dim, jnp.float32))
        self.var = nnx.BatchStat(jnp.ones(dim, jnp.float32))
        self.count = nnx.BatchStat(jnp.zeros((), jnp.int32))  # of batches seen
        self.epsilon = epsilon
        self.dtype = dtype
        self.group = 0

    def __call__(self, x: Float[Array, "B ... C"], train: bool = False) -> Float[Array, "B ... C"]:
        values = x.astype(jnp.float32)
        if train:
            mean, var = self._batch_statistics(values)
        else:
            mean, var = self.mean[...], self.var[...]
        mean, var, scale, bias = (
            _beside(values, x) for x in (mean, var, self.scale[...], self.bias[...])
        )
        scale = scale * jax.lax.rsqrt(var + self.epsilon)
        return ((values - mean) * scale + bias).astype(self.dtype)

    def _batch_statistics(self, values):
        """Mean and variance, [C] or of every image's group [B, C]; moves the running ones."""
        batch, channels = len(values), values.shape[-1]
        group = min(self.group, batch) or batch
        count = group * (values.size // (batch * channels))
        if count < 2:
            raise InputError(
                f"batch norm cannot train on shape {values.shape}: it needs two values of each "
                "channel in every group of images. Use a larger batch"
            )
        if batch % group:
            raise InputError(
                f"batch norm in groups of {group} images cannot train on {batch}: use a multiple"
            )

        def average(values):  # [groups, C]
            if group == batch:
                return values.sum(tuple(range(values.ndim - 1)))[None] / count
            # Over each image first, where it is: so none moves to the others of its group.
            images = values.sum(tuple(range(1, values.ndim - 1)))
            return images.reshape(-1, group, channels).sum(1) / count

        def of_images(groups):
            return groups[0] if group == batch else jnp.repeat(groups, group, axis=0)

        means = average(values)
        mean = of_images(means)
        variances = average(jnp.square(values - _beside(values, mean)))
        for running, now in ((self.mean, means), (self.var, variances * (count / (count - 1)))):
            running[...] = 0.9 * running[...] + 0.1 * jax.lax.stop_gradient(now.mean(0))
        self.count[...] = self.count[...] + 1
        return mean, of_images(variances)


def _beside(values, statistics):
    """[C] or [B, C] with axes between, to be broadcast against values [B, ..., C]."""
    between = (1,) * (values.ndim - 2)
    return statistics.reshape(-1, *between, statistics.shape[-1])


def group_batch_norms(model: nnx.Module, group: int) -> int:
    """Lets every batch norm of a model take its statistics over groups; returns how many there are.

    Args:
      group: images in a group; 0: all of a batch.
    """
    norms = [part for _, part in nnx.iter_modules(model) if isinstance(part, BatchNorm)]
    for norm in norms:
        norm.group = group
    return len(norms)
