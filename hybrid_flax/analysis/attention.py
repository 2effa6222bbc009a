"""Attention as the model computed it: probabilities, and where on the image they lie.

Shapes: B images, n windows of an image, h heads, N queries, M keys.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from hybrid_flax.analysis.layers import check_all_layers, compiled, grid_of
from hybrid_flax.errors import InputError
from hybrid_flax.models.backbone import Backbone
from hybrid_flax.weights.functions import calls_through
from pallas.halo_attention.geometry import Halo
from pallas.watching import watched
from pallas.window_attention.geometry import Windows

_MASKED = 1e-30  # what remains of pairs that are masked by -100: nothing


@dataclasses.dataclass(frozen=True)
class Attention:
    """What one attention layer computed; all arrays float32.

    `weights` [B, n, h, N, M] sum to 1 over the keys; those of linear attention sum to the head's
    temperature, or to less where its normaliser is clamped. n is 1 where there are no windows.
    `total` [B, n, h, N] is the logarithm of what the softmax divided by, in nats: with it rows of
    different windows can be compared; None for linear attention. Weights times `value`
    [B, n, M, h, e] are the layer's output before its projection, `out` [B, n, N, h, e].
    """

    path: str
    kind: str  # "windows", "shifted windows", "global query", "halo", "linear" or "all places"
    geometry: Any  # Windows or Halo; None: all places with all
    map: tuple[int, int]  # its places: of the keys, for a class token
    image: tuple[int, int]  # height and width of the images
    weights: Float[np.ndarray, "B n h N M"]
    total: Float[np.ndarray, "B n h N"] | None
    value: Float[np.ndarray, "B n M h e"]
    out: Float[np.ndarray, "B n N h e"]

    @property
    def has_own_token(self) -> bool:
        """Whether the only query is a class token, which is the first key too."""
        return self.weights.shape[3] == 1 and self.weights.shape[4] > 1


def attention_layers(
    model: Backbone, images: Array, layers: Sequence[str] | None = None
) -> dict[str, Attention]:
    """Runs the model and gives all of its attention layers, by path, in the order of the image.

    Args:
      images: [B, H, W, 3], normalised.
      layers: paths of layers, or of what holds some (`stages/2`); None: all.

    Raises:
      InputError: the model has no attention, or none there; images that it does not take.
    """
    seen = compiled(_seen, model, [images], None if layers is None else tuple(layers))
    size = (int(images.shape[1]), int(images.shape[2]))
    return {each.path: _attention(each, size) for each in seen}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["arrays"],
    meta_fields=["path", "kind", "geometry", "grid"],
)
@dataclasses.dataclass(frozen=True)
class _Seen:
    """What one call of attention computed, and of which module."""

    path: str
    kind: str
    geometry: Any
    grid: tuple[int, int] | None  # the module's map, where it is given one
    arrays: dict[str, Array]


def attention_maps(
    model: Backbone, images: Array, layers: Sequence[str] | None = None
) -> dict[str, Float[np.ndarray, "groups h N M"]]:
    """The attention probabilities that the model used, {path of the layer: [groups, h, N, M]}.

    Groups are windows, row by row, of image after image, or images where a layer has no windows.
    Tokens of a window come row by row. Of shifted windows (Swin) these are the windows of the
    rolled map. Linear attention has weights that sum to the head's temperature. Keys outside of the
    map have probability 0.

    Args:
      images: [B, H, W, 3], normalised.
      layers: paths of layers, or of what holds some (`stages/2`); None: all. The linear attention
        of large maps takes memory: [h, N, N] for N places.

    Returns:
      float32 arrays. A CSWin block has two, `…/stripes0` (vertical) and `…/stripes1`.

    Raises:
      InputError: the model has no attention, or none there; images that it does not take.
    """
    found = attention_layers(model, images, layers)
    return {path: each.weights.reshape(-1, *each.weights.shape[2:]) for path, each in found.items()}


def _seen(model: Backbone, images: Array, layers: tuple[str, ...] | None) -> list[_Seen]:
    owners: dict[int, tuple[str, tuple[int, int] | None]] = {}
    with watched() as calls:

        def named(call, path, part, *args, **kwargs):
            before = len(calls)
            output = call(part, *args, **kwargs)
            given = args[0].shape if args else ()
            grid = (given[1], given[2]) if len(given) == 4 else None
            for number in range(before, len(calls)):
                owners.setdefault(number, (path, grid))  # the innermost ends first
            return output

        with calls_through(model, named):
            model.intermediates(images)
    found = [
        (*owners[i], each)
        for i, each in enumerate(calls)
        # CSWin's trunk runs its first stripes a second time, for a named map.
        if "attention" in each.kind and owners[i][0] != "trunk"
    ]
    if not found:
        raise InputError(
            f"this {type(model).__name__} has no attention to show. GC ViT, L2ViT, GLNet, the "
            "Gramian models and unified models with halo, PVT or Swin have; of InternImage see "
            "sampling_points, of all models grad_cam"
        )
    paths = _distinct([path for path, _, _ in found])
    kept = check_all_layers(layers, paths, "attention")
    return [
        _Seen(path, each.kind, each.geometry, grid, each.arrays)
        for path, (_, grid, each) in zip(paths, found, strict=True)
        if path in kept
    ]


def _distinct(paths: Sequence[str]) -> list[str]:
    """The paths; those that come several times numbered: a CSWin block has two sets of stripes."""
    counts: dict[str, int] = {}
    names = []
    for path in paths:
        number = counts.get(path, 0)
        counts[path] = number + 1
        names.append(f"{path}/stripes{number}" if paths.count(path) > 1 else path)
    return names


def _attention(seen: _Seen, image: tuple[int, int]) -> Attention:
    arrays = {name: np.asarray(value, np.float32) for name, value in seen.arrays.items()}
    if arrays["weights"].ndim == 4:  # no windows
        arrays = {name: value[:, None] for name, value in arrays.items()}
    return Attention(
        seen.path,
        _kind(seen),
        seen.geometry,
        seen.grid or _grid(arrays["weights"], image),
        image,
        arrays["weights"],
        arrays.get("total"),
        arrays["value"],
        arrays["out"],
    )


def _kind(seen: _Seen) -> str:
    geometry = seen.geometry
    if seen.kind == "linear attention":
        return "linear"
    if isinstance(geometry, Halo):
        return "halo"
    if not isinstance(geometry, Windows):
        return "all places"
    if geometry.shared_query:
        return "global query"
    return "shifted windows" if any(geometry.shift) else "windows"


# ------------------------------------------------------------------------------- on the image


def _grid(weights: np.ndarray, image: tuple[int, int]) -> tuple[int, int]:
    queries, keys = weights.shape[3:]
    return grid_of(keys - 1 if queries == 1 and keys > 1 else queries, *image)


def attended_from(
    found: Attention, image: int, head: int, row: int, column: int
) -> Float[np.ndarray, "h w"]:
    """Where a place of the map looks: its probabilities, laid out on the map.

    The places of shifted windows are put back where they are on the map, and pairs that are masked
    are 0. Of a global query (row, column) is a place of the query map, which is the whole image
    made as small as a window: each window answers it with probabilities of its own, and they are
    reweighted by the windows' log-sum-exp, so that all together sum to 1 (our definition; the paper
    has none). PVT's keys are the reduced map. A class token has no place, row and column are
    ignored, and what it gives itself is left out.

    Args:
      found: of `attention_layers`.
      image, head: numbers.

    Raises:
      InputError: a place or a head that is not there.
    """
    _check(found, head, row, column)
    weights = found.weights[image, :, head]
    if found.kind == "global query":
        return _joined(found, image, head, row, column)
    if isinstance(found.geometry, Windows):
        return _cut(found, _in_window(found.geometry, weights, row, column))
    if isinstance(found.geometry, Halo):
        return _cut(found, _around(found.geometry, weights, row, column))
    if found.has_own_token:
        return weights[0, 0, 1:].reshape(found.map)
    answers = weights[0, row * found.map[1] + column]
    return answers.reshape(grid_of(len(answers), *found.image))


def received(found: Attention, image: int, head: int) -> Float[np.ndarray, "h w"]:
    """How much each place is looked at: the mean over the queries of what it gets, on the map.

    In windows the mean is over the window's own queries, so that a place looked at as much as its
    neighbours has one over the number of keys.
    """
    weights = found.weights[image, :, head].mean(1)  # [n, M]
    geometry = found.geometry
    if isinstance(geometry, Windows):
        rows, columns = _places(geometry)
        canvas = np.zeros((geometry.height, geometry.width), np.float32)
        canvas[rows, columns] = weights
        return _cut(found, canvas)
    if isinstance(geometry, Halo):
        canvas = np.zeros((geometry.height + 2 * geometry.halo, geometry.width + 2 * geometry.halo))
        for index in range(len(weights)):
            canvas[_halo_box(geometry, index)] += weights[index].reshape((geometry.window,) * 2)
        return _cut(found, _without_halo(geometry, canvas).astype(np.float32))
    answers = weights[0, 1:] if found.has_own_token else weights[0]
    return answers.reshape(grid_of(len(answers), *found.image))


def _check(found: Attention, head: int, row: int, column: int) -> None:
    heads = found.weights.shape[2]
    if not 0 <= head < heads:
        raise InputError(f"head={head}: {found.path} has heads 0 to {heads - 1}")
    height, width = query_size(found)
    if not (0 <= row < height and 0 <= column < width):
        raise InputError(
            f"row={row}, column={column}: the queries of {found.path} are a map of "
            f"{height}×{width} places"
        )


def query_size(found: Attention) -> tuple[int, int]:
    """Height and width of the map of queries that `attended_from` chooses from."""
    if found.kind == "global query":
        return found.geometry.window
    return (1, 1) if found.has_own_token else found.map


def _cut(found: Attention, canvas: np.ndarray) -> np.ndarray:
    """Without the padding that fills up windows at the right and at the bottom."""
    height, width = found.map
    return canvas[:height, :width]


def _places(geometry: Windows) -> tuple[np.ndarray, np.ndarray]:
    """(rows, columns) on the map of every token, [windows, N]."""
    (a, b), (down, right) = geometry.window, geometry.shift
    rows, columns = np.indices((geometry.height, geometry.width))

    def windows(x):
        x = np.roll(x, (-down, -right), (0, 1))
        x = x.reshape(geometry.height // a, a, geometry.width // b, b)
        return x.swapaxes(1, 2).reshape(-1, a * b)

    return windows(rows), windows(columns)


def _in_window(geometry: Windows, weights: np.ndarray, row: int, column: int) -> np.ndarray:
    rows, columns = _places(geometry)
    window, token = (int(x[0]) for x in np.nonzero((rows == row) & (columns == column)))
    canvas = np.zeros((geometry.height, geometry.width), np.float32)
    answers = weights[window, token]
    canvas[rows[window], columns[window]] = np.where(answers < _MASKED, 0, answers)
    return canvas


def _joined(found: Attention, image: int, head: int, row: int, column: int) -> np.ndarray:
    geometry = found.geometry
    token = row * geometry.window[1] + column
    assert found.total is not None
    total = found.total[image, :, head, token].astype(np.float64)
    shares = np.exp(total - total.max())
    shares /= shares.sum()
    rows, columns = _places(geometry)
    canvas = np.zeros((geometry.height, geometry.width), np.float32)
    canvas[rows, columns] = found.weights[image, :, head, token] * shares[:, None]
    return _cut(found, canvas)


def _halo_box(geometry: Halo, index: int) -> tuple[slice, slice]:
    """The neighbourhood of a block on the map with its halo."""
    down, across = divmod(index, geometry.width // geometry.block)
    top, left = down * geometry.block, across * geometry.block
    return slice(top, top + geometry.window), slice(left, left + geometry.window)


def _without_halo(geometry: Halo, canvas: np.ndarray) -> np.ndarray:
    halo = geometry.halo
    return canvas[halo : halo + geometry.height, halo : halo + geometry.width]


def _around(geometry: Halo, weights: np.ndarray, row: int, column: int) -> np.ndarray:
    block = geometry.block
    index = row // block * (geometry.width // block) + column // block
    token = row % block * block + column % block
    halo = geometry.halo
    canvas = np.zeros((geometry.height + 2 * halo, geometry.width + 2 * halo), np.float32)
    canvas[_halo_box(geometry, index)] = weights[index, token].reshape((geometry.window,) * 2)
    return _without_halo(geometry, canvas)
