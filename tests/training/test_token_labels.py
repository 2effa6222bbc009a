"""Targets of token labelling, against RoI align sample by sample."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_flax.training.token_labels import token_targets


def roi_align(features, box, rows, columns):
    """torchvision's, unaligned, with adaptive sampling: [H, W, C] and (x1, y1, x2, y2)."""
    x1, y1, x2, y2 = box
    height, width = max(y2 - y1, 1.0) / rows, max(x2 - x1, 1.0) / columns
    down, across = math.ceil(height), math.ceil(width)
    out = np.zeros((rows, columns, features.shape[2]))
    for row in range(rows):
        for column in range(columns):
            for i in range(down):
                for j in range(across):
                    y = y1 + (row + (i + 0.5) / down) * height
                    x = x1 + (column + (j + 0.5) / across) * width
                    out[row, column] += bilinear(features, y, x) / (down * across)
    return out


def bilinear(features, y, x):
    height, width, _ = features.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return 0.0
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = features[top, left] * (1 - x + left) + features[top, right] * (x - left)
    lower = features[bottom, left] * (1 - x + left) + features[bottom, right] * (x - left)
    return upper * (1 - y + top) + lower * (y - top)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


@pytest.mark.parametrize("transposed", [False, True])
def test_targets_are_those_of_roi_align(transposed):
    rng, classes, size = np.random.default_rng(0), 12, 9
    logits = rng.normal(5, 3, (3, 5, size, size))
    ids = rng.permuted(np.tile(np.arange(classes), (3, size, size, 1)), axis=-1)[..., :5]
    maps = np.stack([logits, ids.transpose(0, 3, 1, 2)], axis=1).astype(np.float16)
    crops = np.array([[0, 0, 1, 1], [0.5, 0.1, 0.3, 0.8], [0.93, 0.4, 0.07, 0.05]], np.float32)
    images, tokens = token_targets(
        jnp.asarray(maps),
        jnp.asarray(crops),
        num_classes=classes,
        grid=(4, 3),
        smoothing=0.1,
        transposed=transposed,
    )
    off = 0.1 / classes
    for n, (left, top, width, height) in enumerate(crops.astype(np.float64)):
        dense = np.zeros((size, size, classes))
        rows, columns = np.indices((size, size))
        for k in range(5):
            dense[rows, columns, maps[n, 1, k].astype(int)] = maps[n, 0, k]
        box = np.array([left, top, left + width, top + height])
        if transposed:
            box = box[[1, 0, 3, 2]]
        box = box * size - 0.5
        for got, grid in ((images[n][None], (1, 1)), (tokens[n], (4, 3))):
            want = softmax(roi_align(dense, box, *grid)).reshape(-1, classes)
            np.testing.assert_allclose(got, want * (1 - 0.1 + off) + off, rtol=2e-5)


@pytest.mark.parametrize(("transposed", "rows"), [(False, [True, True]), (True, [True, False])])
def test_the_left_half_has_the_labels_of_the_left_half(transposed, rows):
    """The authors' code takes the upper half instead (half of its tokens have the other class)."""
    maps = np.zeros((1, 2, 1, 18, 18), np.float16)
    maps[:, 0] = 20
    maps[:, 1, :, :, 9:] = 1
    crops = jnp.array([[0.0, 0.0, 0.5, 1.0]])
    options = {"num_classes": 3, "grid": (7, 7), "smoothing": 0.0, "transposed": transposed}
    _, tokens = token_targets(jnp.asarray(maps), crops, **options)
    is_left = np.asarray(tokens[0, :, 0]).reshape(7, 7) > 0.5
    assert is_left[:, [0, -1]].all(0).tolist() == rows
