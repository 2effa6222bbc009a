import numpy as np
import pytest
from PIL import Image

from hybrid_flax.data.augment import RandAugment, augment_op, draw_interpolation, fill_colour
from tests.data.test_images import GOLDEN

RECIPE = "rand-m9-mstd0.5-inc1"


def test_the_recipe_string_is_read():
    assert RandAugment.parse(RECIPE) == RandAugment(9.0, 0.5, 2, True)
    assert RandAugment.parse("rand-m7-n3") == RandAugment(7.0, 0.0, 3, False)


@pytest.mark.parametrize("text", ["rand-m9-x3", "random-m9", "", "rand-m", "rand-inc2"])
def test_other_strings_are_refused(text):
    with pytest.raises(ValueError, match="expected the form rand-m9-mstd0.5-inc1"):
        RandAugment.parse(text)


@pytest.mark.parametrize("text", ["rand-m11", "rand-m9-n0"])
def test_numbers_out_of_range_are_refused(text):
    with pytest.raises(ValueError, match="m must be 0 to 10 and n at least 1"):
        RandAugment.parse(text)


def test_magnitudes_become_the_arguments_of_timm():
    import json

    policy = RandAugment.parse(RECIPE)
    for case in json.loads((GOLDEN / "preprocess.json").read_text())["ops"]:
        got = policy.arguments(case["op"], case["magnitude"], case["sign"])
        np.testing.assert_allclose(got, case["args"], err_msg=str(case))


def test_half_of_the_drawn_operations_are_applied():
    policy, photo = RandAugment.parse(RECIPE), Image.new("RGB", (4, 4))
    applied = []

    class Spy(RandAugment):
        def arguments(self, name, magnitude, sign):
            applied.append((name, magnitude, sign))
            return super().arguments(name, magnitude, sign)

    spy = Spy(**vars(policy))
    rng = np.random.default_rng(0)
    for _ in range(3000):
        spy(photo, rng, fill=(0, 0, 0), interpolation="random")
    names, magnitudes, signs = zip(*applied, strict=True)
    assert len(applied) / 3000 == pytest.approx(1, abs=0.06)  # two drawn, each with one half
    assert len(set(names)) == 15
    counts = [names.count(name) for name in set(names)]
    assert min(counts) > 0.7 * len(names) / 15
    assert np.mean(magnitudes) == pytest.approx(9, abs=0.05)
    assert np.std(magnitudes) == pytest.approx(0.5, abs=0.05)
    assert max(magnitudes) <= 10
    assert np.mean(signs) == pytest.approx(0, abs=0.05)


def test_the_same_random_numbers_give_the_same_image():
    rng = np.random.default_rng(3)
    photo = Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    policy = RandAugment.parse("rand-m9-n5-mstd0.5-inc1")

    def run():
        rng = np.random.default_rng(7)
        return np.asarray(policy(photo, rng, fill=(1, 2, 3), interpolation="random"))

    np.testing.assert_array_equal(run(), run())


def test_random_interpolation_is_bilinear_or_bicubic():
    rng = np.random.default_rng(0)
    drawn = {draw_interpolation("random", rng) for _ in range(50)}
    assert drawn == {"bilinear", "bicubic"}
    assert draw_interpolation("nearest", rng) == "nearest"


def test_the_fill_is_the_rounded_mean():
    assert fill_colour((0.485, 0.456, 0.406)) == (124, 116, 104)


def test_bad_operations_are_named():
    photo = Image.new("RGB", (4, 4))
    with pytest.raises(ValueError, match="unknown operation 'Blur'; choose one of AutoContrast"):
        augment_op(photo, "Blur", 1.0)
    with pytest.raises(ValueError, match=r"Rotate takes 1 argument\(s\), got 0"):
        augment_op(photo, "Rotate")
    with pytest.raises(ValueError, match=r"Invert takes 0 argument\(s\), got 1"):
        augment_op(photo, "Invert", 1.0)
