import hashlib
import math
import re

import numpy as np
import pytest
from PIL import Image

from hybrid_flax.analysis import invariance
from hybrid_flax.errors import InputError
from tests.analysis import golden


def test_every_view_is_the_studys_to_the_pixel():
    photos = {name: golden.photo(name) for _, name, *_ in golden.META["views"]}
    wrong = []
    for kind, name, strength, direction, sha256 in golden.META["views"]:
        got = invariance.transformed(photos[name], kind, strength, direction=direction)
        if hashlib.sha256(got.tobytes()).hexdigest() != sha256:
            wrong.append((kind, name, strength, direction))
    assert wrong == []


@pytest.mark.parametrize("case", golden.META["scores"], ids=lambda case: case["case"])
def test_scores_are_the_studys(case):
    name, metrics = case["case"], case["metrics"]
    standard, labels = (golden.ARRAYS[f"scores/{name}_{what}"] for what in ("standard", "labels"))
    for view in case["views"]:
        logits = standard if view == "same" else golden.ARRAYS[f"scores/{name}_{view}"]
        got = invariance.scores(logits, standard, labels)
        assert list(got) == ["loss", "divergence", "consistency", "top1", "top5"]
        assert got["loss"] == pytest.approx(metrics[f"{view} loss"], rel=1e-5)
        assert got["consistency"] == pytest.approx(metrics[f"{view} consistency"], rel=1e-6)
        assert got["top1"] == pytest.approx(metrics[f"{view} acc1"], rel=1e-6)
        assert got["top5"] == pytest.approx(metrics[f"{view} acc5"], rel=1e-6)


def test_the_divergence_of_equal_views_is_0_and_their_loss_is_the_entropy():
    logits = np.array([[0.0, 1.0, 3.0], [2.0, 2.0, 2.0]], np.float32)
    got = invariance.scores(logits, logits, np.array([2, 0]))
    assert got["divergence"] == pytest.approx(0, abs=1e-12)
    share = np.exp(logits[0]) / np.exp(logits[0]).sum()
    assert got["loss"] == pytest.approx((-(share * np.log(share)).sum() + math.log(3)) / 2)
    assert got["consistency"] == 100
    assert got["top5"] == 100


def test_strength_0_is_the_standard_view():
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (53, 79, 3), np.uint8))
    want = invariance.transformed(photo, "standard", image_size=32)
    for kind in ("translate", "rotate_before", "rotate_after"):
        got = invariance.transformed(photo, kind, 0, image_size=32, as_published=False)
        assert np.array_equal(got, want), kind
    assert np.array_equal(invariance.transformed(photo, "scale", 0.875, image_size=32), want)


def test_a_direction_is_drawn_from_seed_image_and_strength_alone():
    drawn = [invariance.drawn_direction(0, image, 8) for image in range(400)]
    assert sorted(set(drawn)) == list(range(8))
    assert drawn == [invariance.drawn_direction(0, image, 8) for image in range(400)]
    assert drawn != [invariance.drawn_direction(1, image, 8) for image in range(400)]
    assert drawn != [invariance.drawn_direction(0, image, 12) for image in range(400)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("shear", 1), "kind='shear': expected one of standard, translate, rotate_before"),
        (("translate", 1.5), "strength=1.5 of translate: expected a whole number of pixels"),
        (("translate", 224), "strength=224 of translate: expected a whole number of pixels from"),
        (("scale", 0), "strength=0 of scale: expected a crop fraction from 0.01"),
        (("rotate_after", math.nan), "strength=nan of rotate_after: expected a finite number"),
    ],
)
def test_what_cannot_be_is_said(arguments, message):
    with pytest.raises(InputError, match=re.escape(message)):
        invariance.transformed(Image.new("RGB", (300, 300)), *arguments)


def test_other_things_that_cannot_be_are_said():
    photo = Image.new("RGB", (300, 300))
    with pytest.raises(InputError, match="direction=8: expected 0 to 7"):
        invariance.transformed(photo, "translate", 4, direction=8)
    with pytest.raises(InputError, match="the photo is a ndarray; expected a Pillow image"):
        invariance.transformed(np.zeros((9, 9, 3)), "standard")
    with pytest.raises(InputError, match=r"logits of shapes \(2, 3\) and \(3, 3\), labels \(2,\)"):
        invariance.scores(np.zeros((2, 3)), np.zeros((3, 3)), np.zeros(2, int))
