"""Gramian similarity: which places of a head's map agree with a chosen one (arXiv:2310.16483)."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from hybrid_flax.analysis.layers import compiled
from hybrid_flax.errors import InputError
from hybrid_flax.models.backbone import Backbone


def gramian_similarity(
    model: Backbone, images: Array, row: int | None = None, column: int | None = None
) -> dict[str, Float[np.ndarray, "B h w"]]:
    """The cosine of every place's vector to that of a chosen place, {head: [B, h, w]}, float32.

    The vectors are those of the map that the head makes its Gramian of, which sums over places and
    so has no picture of its own: this one is a definition of ours.

    Args:
      images: [B, H, W, 3], normalised.
      row, column: of the place; None: the middle, (h // 2, w // 2).

    Raises:
      InputError: the model has no Gramian heads; a place that is not there; images that it does not
        take.
    """
    found = compiled(_similarities, model, [images], row, column)
    return {head: np.asarray(similarity) for head, similarity in found.items()}


def _similarities(
    model: Backbone, images: Array, row: int | None, column: int | None
) -> dict[str, Array]:
    maps = model.intermediates(images)
    found = {}
    for name in maps:
        if not name.endswith("_gram"):
            continue
        head = name.removesuffix("_gram")
        vectors = maps.get(f"{head}_layer", maps[f"{head}_contract"]).astype(jnp.float32)
        height, width = vectors.shape[1:3]
        i = height // 2 if row is None else row
        j = width // 2 if column is None else column
        if not (0 <= i < height and 0 <= j < width):
            raise InputError(
                f"row={row}, column={column}: the map has {height}×{width} places, counted from 0"
            )
        lengths = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
        vectors = vectors / jnp.maximum(lengths, 1e-12)
        similarity = jnp.einsum("bhwc,bc->bhw", vectors, vectors[:, i, j])
        found[f"heads/{head.removeprefix('h')}"] = similarity
    if not found:
        raise InputError(
            f"this {type(model).__name__} has no Gramian heads: take a model whose name "
            "begins with ga_"
        )
    return found
