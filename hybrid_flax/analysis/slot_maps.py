"""The slots of GLNet: which slot each place belongs to, and some slots that stand for all.

(GLMix, arXiv:2411.14429.) A place hands itself to the slots by a softmax over them; the maps here
are these shares.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hybrid_flax.analysis.layers import compiled
from hybrid_flax.errors import InputError
from hybrid_flax.models.backbone import Backbone

_LOGITS = "_slot_logits"
_ROUNDS = 100  # of k-medoids, at most


def slots(model: Backbone, images: Array) -> dict[str, Float[np.ndarray, "B slots h w"]]:
    """The soft assignment of every place to the slots, {path: [B, slots, h, w]}, float32.

    At every place the shares of the slots sum to 1. Blocks of attention over the whole map have no
    slots and are left out.

    Raises:
      InputError: the model has no slots; images that it does not take.
    """
    found = compiled(_shares, model, [images])
    return {path: np.asarray(shares) for path, shares in found.items()}


def _shares(model: Backbone, images: Array) -> dict[str, Array]:
    maps = model.intermediates(images)
    found = {}
    for name in maps:
        if name.endswith(_LOGITS):
            block = name.removesuffix(_LOGITS)
            stage, number = block.removeprefix("s").split("b")
            _, height, width, _ = maps[f"{block}_out"].shape
            shares = jax.nn.softmax(maps[name].astype(jnp.float32), axis=1)
            shares = shares.reshape(*shares.shape[:2], height, width)
            found[f"stages/{int(stage) - 1}/blocks/{number}/mixer"] = shares
    if not found:
        raise InputError(
            f"this {type(model).__name__} has no slots: take a GLNet, such as glnet_4g, with "
            "blocks of kind G"
        )
    return found


def slot_distances(
    shares: Float[np.ndarray, "slots h w"], *, smallest: float, largest: float
) -> Float[np.ndarray, "slots slots"]:
    """Euclidean distances between the maps of slots, which are scaled to 0 to 1 first.

    As PyTorch's pairwise distance has it 1e-6 is added to every difference, so that a slot is not
    quite 0 from itself.

    Args:
      smallest, largest: what becomes 0 and 1. The authors take them of the whole batch.
    """
    maps = shares.reshape(len(shares), -1).astype(np.float32)
    maps = (maps - np.float32(smallest)) / np.float32(largest - smallest or 1)
    return np.stack([np.linalg.norm(one[None] - maps + np.float32(1e-6), axis=1) for one in maps])


def k_medoids(
    distances: Float[np.ndarray, "N N"], start: Int[np.ndarray, "k"]
) -> Int[np.ndarray, "k"]:
    """The medoids that are reached from a start, in the order of those.

    In turn, at most 100 times: each of the N joins its nearest medoid, the first of equals; in each
    cluster the one with the smallest sum of distances to the others is the new medoid, the first of
    equals. A cluster that lost all its members keeps its medoid.

    Args:
      distances: between all pairs.
      start: k different numbers below N; `first_medoids` makes some.

    Raises:
      InputError: distances that are no square, or a start that is not as above.
    """
    distances, medoids = np.asarray(distances), np.asarray(start)
    if distances.ndim != 2 or distances.shape[0] != distances.shape[1]:
        raise InputError(f"distances have shape {distances.shape}: expected a square [N, N]")
    count = len(distances)
    if (
        medoids.ndim != 1
        or not np.issubdtype(medoids.dtype, np.integer)
        or len(set(medoids.tolist())) != len(medoids)
        or not len(medoids)
        or not all(0 <= each < count for each in medoids)
    ):
        raise InputError(
            f"start={start!r}: expected different whole numbers from 0 to {count - 1}, the first "
            "medoids"
        )
    for _ in range(_ROUNDS):
        nearest = distances[:, medoids].argmin(1)
        new = medoids.copy()
        for place in range(len(medoids)):
            members = np.flatnonzero(nearest == place)
            if len(members):
                sums = distances[np.ix_(members, members)].sum(0)
                new[place] = members[sums.argmin()]
        if np.array_equal(new, medoids):
            break
        medoids = new
    return medoids


def first_medoids(distances: Float[np.ndarray, "N N"], count: int) -> Int[np.ndarray, "k"]:
    """A start for `k_medoids` that follows from the distances alone.

    (BUILD of Kaufman and Rousseeuw, 1990.) First the one with the smallest sum of distances, then,
    again and again, the one that brings the most of the others nearer.

    Raises InputError for a count that is not from 1 to N.
    """
    if not 1 <= count <= len(distances):
        raise InputError(f"{count} medoids: expected from 1 to {len(distances)}")
    chosen = [int(distances.sum(1).argmin())]
    nearest = distances[chosen[0]].copy()
    while len(chosen) < count:
        gains = np.maximum(nearest[None] - distances, 0).sum(1)
        gains[chosen] = -1
        chosen.append(int(gains.argmax()))
        nearest = np.minimum(nearest, distances[chosen[-1]])
    return np.array(chosen)
