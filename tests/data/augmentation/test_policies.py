import collections
import json
import math

import numpy as np
import pytest
from PIL import Image

from hybrid_flax.data.augmentation.auto_augment import SUB_POLICIES, AutoAugment
from hybrid_flax.data.augmentation.magnitudes import ARGUMENTS, Spread, operation_at
from hybrid_flax.data.augmentation.operations import Operation, apply_operations, augment_op
from hybrid_flax.data.augmentation.policies import (
    ColourJitter,
    TrivialAugment,
    parse_policy,
    trivial_operation,
)
from hybrid_flax.data.augmentation.rand_augment import RandAugment
from tests.data.test_images import GOLDEN

RECIPE = "rand-m9-mstd0.5-inc1"


def draws(policy, count, interpolation="bicubic", seed=0):
    rng = np.random.default_rng(seed)
    return [policy.draw(rng, interpolation) for _ in range(count)]


# ------------------------------------------------------------------------------------ magnitudes


def test_magnitudes_become_the_arguments_of_timm():
    for case in json.loads((GOLDEN / "preprocess.json").read_text())["ops"]:
        increasing = f"{case['op']}Increasing"
        name = increasing if increasing in ARGUMENTS else case["op"]
        chance = 0.2 if case["sign"] == 1 else 0.7
        operation, args = operation_at(name, case["magnitude"], chance)
        assert operation == case["op"]
        np.testing.assert_allclose(args, case["args"], err_msg=str(case))


@pytest.mark.parametrize(
    ("name", "magnitude", "chance", "expected"),
    [
        ("Posterize", 6, 0, ("Posterize", (2,))),
        ("PosterizeIncreasing", 6, 0, ("Posterize", (2,))),
        ("PosterizeIncreasing", 10, 0, ("Posterize", (0,))),
        ("PosterizeIncreasing", 13, 0, ("Posterize", (-1,))),
        ("PosterizeOriginal", 8, 0, ("Posterize", (7,))),
        ("Solarize", 5, 0, ("Solarize", (128,))),
        ("Solarize", 12, 0, ("Solarize", (256,))),
        ("SolarizeAdd", 12, 0, ("SolarizeAdd", (128,))),
        ("Color", 5, 0.9, ("Color", (1.0,))),
        ("Color", 0, 0, ("Color", (0.1,))),
        ("ColorIncreasing", 12, 0.9, ("Color", (0.1,))),
        ("Rotate", 12, 0.5, ("Rotate", (-36.0,))),
        ("Desaturate", 0, 0, ("Color", (0.5,))),
        ("Desaturate", 10, 0, ("Color", (0.0,))),
        ("GaussianBlur", 5, 0, ("GaussianBlur", (1.05,))),
        ("GaussianBlurRand", 10, 0.5, ("GaussianBlur", (1.05,))),
        ("Equalize", 7, 0, ("Equalize", ())),
    ],
)
def test_arguments_at_single_magnitudes(name, magnitude, chance, expected):
    operation, args = operation_at(name, magnitude, chance)
    assert operation == expected[0]
    assert args == pytest.approx(expected[1])


def test_the_spread_of_magnitudes():
    rng = np.random.default_rng(0)
    assert Spread(0.0, 10.0).draw(rng, 7.0) == 7.0
    normal = [Spread(0.5, 10.0).draw(rng, 9.0) for _ in range(3000)]
    assert np.mean(normal) == pytest.approx(9, abs=0.05)
    assert np.std(normal) == pytest.approx(0.5, abs=0.03)
    assert max(normal) <= 10
    uniform = [Spread(math.inf, 10.0).draw(rng, 8.0) for _ in range(3000)]
    assert np.mean(uniform) == pytest.approx(4, abs=0.15)
    assert 7.9 < max(uniform) <= 8


# ----------------------------------------------------------------------------------- RandAugment


def test_the_recipe_string_is_read():
    policy = parse_policy(RECIPE)
    assert isinstance(policy, RandAugment)
    assert policy.magnitude == 9
    assert policy.spread == Spread(0.5, 10.0)
    assert (policy.layers, policy.probability, policy.weights) == (2, 0.5, None)
    assert len(policy.names) == 15
    assert sum(name.endswith("Increasing") for name in policy.names) == 6
    plain = RandAugment.parse("rand-m7-n3")
    assert (plain.magnitude, plain.spread, plain.layers) == (7, Spread(0.0, 10.0), 3)
    assert not any(name.endswith("Increasing") for name in plain.names)
    assert RandAugment.parse("rand").magnitude == 10


def test_every_option_of_timm():
    policy = RandAugment.parse("rand-n1-m15-mmax20-p0.9-mstdinf-inc0")
    assert (policy.magnitude, policy.spread) == (15, Spread(math.inf, 20.0))
    assert (policy.layers, policy.probability) == (1, 0.9)
    assert RandAugment.parse("rand-mstd101").spread.std == math.inf
    weighted = RandAugment.parse("rand-tweights-mstd1")
    assert dict(zip(weighted.names, weighted.weights, strict=True)) == pytest.approx(
        {  # of 10.1 in all
            "Rotate": 3 / 10.1, "ShearX": 2 / 10.1, "ShearY": 2 / 10.1, "TranslateX": 1 / 10.1,
            "TranslateY": 1 / 10.1, "ColorIncreasing": 0.25 / 10.1,
            "SharpnessIncreasing": 0.25 / 10.1, "AutoContrast": 0.25 / 10.1,
            "SolarizeIncreasing": 0.05 / 10.1, "SolarizeAdd": 0.05 / 10.1,
            "ContrastIncreasing": 0.05 / 10.1, "BrightnessIncreasing": 0.05 / 10.1,
            "Equalize": 0.05 / 10.1, "PosterizeIncreasing": 0.05 / 10.1, "Invert": 0.05 / 10.1,
        },
        rel=0.01,
    )  # fmt: skip
    assert RandAugment.parse("rand-t3a-n1").names == (
        "SolarizeIncreasing", "Desaturate", "GaussianBlur",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "part"),
    [("rand-m9-x3", "'x3'"), ("rand-m", "'m'"), ("rand-w0", "'w0'"), ("rand-tall", "'tall'"),
     ("rand-m-9", "'m'"), ("rand-m9--n2", "''")],
)  # fmt: skip
def test_parts_that_are_not_understood_are_named(text, part):
    with pytest.raises(ValueError, match=rf"{part} is not understood; .* rand-m9-mstd0.5-inc1"):
        parse_policy(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rand-m11", "'rand-m11': m must be 0 to 10; mmax raises that"),
        ("rand-m13-mmax12", "m must be 0 to 12"),
        ("rand-m9-n0", "n must be a whole number from 1 to 32"),
        ("rand-n1000000000", "n must be a whole number from 1 to 32"),
        (f"rand-n{'9' * 400}", "n must be a whole number from 1 to 32"),
        (f"rand-m5-mmax{'9' * 400}", "mmax must be up to 100"),
        ("rand-n1.5", "n must be a whole number from 1 to 32"),
        ("rand-p1.5", "p must be 0 to 1"),
        ("rand-inc2", "inc must be 0 or 1"),
        ("rand-t3aw-n20", "n must be up to 14, as weighted operations are never drawn twice"),
        ("rand-m9-m8", "'rand-m9-m8': m is given twice"),
    ],
)
def test_numbers_out_of_range_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_policy(text)


def test_half_of_the_drawn_operations_are_applied():
    drawn = draws(RandAugment.parse(RECIPE), 3000, "random")
    applied = [step for steps in drawn for step in steps]
    assert len(applied) / 3000 == pytest.approx(1, abs=0.06)  # two drawn, each with one half
    counts = collections.Counter(step.name for step in applied)
    assert len(counts) == 15
    assert min(counts.values()) > 0.7 * len(applied) / 15
    degrees = np.array([step.args[0] for step in applied if step.name == "Rotate"])
    assert np.mean(np.abs(degrees)) == pytest.approx(27, abs=0.5)
    assert np.mean(degrees > 0) == pytest.approx(0.5, abs=0.12)
    filters = collections.Counter(step.interpolation for step in applied)
    assert filters["bilinear"] / len(applied) == pytest.approx(0.5, abs=0.04)
    assert filters["bilinear"] + filters["bicubic"] == len(applied)


def test_weighted_operations_come_by_their_weight_and_never_twice():
    drawn = draws(RandAugment.parse("rand-t3aw-n2-p1"), 2000)
    # Desaturate at 10 is Color 0; ColorIncreasing is never that.
    kinds = [{(step.name, step.args == (0.0,)) for step in steps} for steps in drawn]
    assert {len(kind) for kind in kinds} == {2}
    first = collections.Counter(steps[0].name for steps in drawn)
    assert first["GaussianBlur"] / 2000 == pytest.approx(6 / 33, abs=0.03)
    assert first["Equalize"] / 2000 == pytest.approx(1 / 33, abs=0.015)


# ----------------------------------------------------------------------------------- AutoAugment


def test_the_tables_of_auto_augment():
    assert {name: len(rows) for name, rows in SUB_POLICIES.items()} == {
        "original": 25, "originalr": 25, "v0": 25, "v0r": 25, "3a": 3,
    }  # fmt: skip
    assert all(len(row) == 2 for name in ("original", "v0") for row in SUB_POLICIES[name])
    # The first sub-policy of the paper's table, and how the four readings of Posterize differ.
    assert SUB_POLICIES["original"][0] == (("PosterizeOriginal", 0.4, 8), ("Rotate", 0.6, 9))
    assert SUB_POLICIES["originalr"][0][0][0] == "PosterizeIncreasing"
    assert SUB_POLICIES["v0"][12][0][0] == "Posterize"
    assert SUB_POLICIES["v0r"][12][0][0] == "PosterizeIncreasing"


def test_auto_augment_draws_a_row_and_each_part_with_its_probability():
    policy = parse_policy("v0")
    assert policy == AutoAugment(SUB_POLICIES["v0"], Spread(0.0, 10.0))
    counts = collections.Counter(step for steps in draws(policy, 6000) for step in steps)
    # Invert occurs once in the table, with 0.4; TranslateY once with 0.8, at 9, of either sign.
    assert counts[Operation("Invert")] / 6000 == pytest.approx(0.4 / 25, abs=0.006)
    moved = [step for step in counts if step.name == "TranslateY"]
    assert sorted(step.args[0] for step in moved) == pytest.approx([-0.405, 0.405])
    assert sum(counts[step] for step in moved) / 6000 == pytest.approx(0.8 / 25, abs=0.008)
    assert Operation("Posterize", (2,)) in counts


def test_auto_augment_with_spread_magnitudes():
    assert parse_policy("original-mstd0.5").spread == Spread(0.5, 10.0)
    with pytest.raises(ValueError, match="'m9' is not understood; expected the form v0 or v0-mstd"):
        parse_policy("v0-m9")


# -------------------------------------------------------------------------------- TrivialAugment


@pytest.mark.parametrize(
    ("name", "step", "sign", "expected"),
    [
        ("Identity", 7, 1, None),
        ("AutoContrast", 7, 1, ()),
        ("ShearX", 30, -1, (-0.99,)),
        ("TranslateXPixels", 30, 1, (-32,)),  # torchvision moves to the right
        ("TranslateYPixels", 14, -1, (14,)),  # ⌊14.93⌋
        ("TranslateYPixels", 15, -1, (15,)),  # float32: ⌊15.999999⌋
        ("Rotate", 20, 1, (90.0,)),
        ("Brightness", 30, -1, (0.01,)),
        ("Posterize", 30, 1, (2,)),
        ("Posterize", 3, 1, (7,)),
        ("Solarize", 2, 1, (238.0,)),
        ("Solarize", 30, 1, (0.0,)),
    ],
)
def test_the_wide_space_of_trivial_augment(name, step, sign, expected):
    got = trivial_operation(name, step, sign)
    if expected is None:
        assert got is None
    else:
        assert got.name == name
        assert got.args == pytest.approx(expected)
        assert got.fill == (0, 0, 0)


@pytest.mark.parametrize("text", ["trivial-wide", "ta_wide"])
def test_trivial_augment_draws_one_of_fourteen(text):
    assert parse_policy(text) == TrivialAugment()
    drawn = draws(parse_policy(text), 5000)
    counts = collections.Counter(steps[0].name if steps else "Identity" for steps in drawn)
    assert {len(steps) for steps in drawn} == {0, 1}
    assert len(counts) == 14
    assert max(abs(count / 5000 - 1 / 14) for count in counts.values()) < 0.02
    degrees = [steps[0].args[0] for steps in drawn if steps and steps[0].name == "Rotate"]
    assert len(set(np.abs(degrees))) == 31
    assert np.mean(np.sign(degrees)) == pytest.approx(0, abs=0.15)


# ---------------------------------------------------------------------- 3-Augment, colour jitter


def test_three_augment_is_one_of_three_and_jitter():
    policy = parse_policy("3a", (0.3, 0.3, 0.3, 0.0))
    drawn = draws(policy, 3000)
    first = collections.Counter(steps[0].name for steps in drawn)
    assert {name: count / 3000 for name, count in first.items()} == {
        "Solarize": pytest.approx(1 / 3, abs=0.04),
        "Color": pytest.approx(1 / 3, abs=0.04),
        "GaussianBlur": pytest.approx(1 / 3, abs=0.04),
    }
    assert {s[0].args[0] for s in drawn if s[0].name == "Solarize"} == {128}
    assert {s[0].args[0] for s in drawn if s[0].name == "Color"} == {0.0}
    radii = [s[0].args[0] for s in drawn if s[0].name == "GaussianBlur"]
    assert 0.1 <= min(radii) < 0.15
    assert 1.95 < max(radii) < 2
    assert {tuple(sorted(s.name for s in steps[1:])) for steps in drawn} == {
        ("Brightness", "Color", "Contrast")
    }


def test_colour_jitter_is_dropped_beside_a_policy_but_not_beside_three_augment():
    jitter = (0.4, 0.4, 0.4, 0.0)
    assert parse_policy("", jitter) == ColourJitter(*jitter)
    assert parse_policy(RECIPE, jitter) == parse_policy(RECIPE)
    assert parse_policy("rand-t3a", jitter) != parse_policy("rand-t3a")
    assert parse_policy("") is None


def test_colour_jitter_draws_factors_and_an_order():
    drawn = draws(ColourJitter(0.4, 1.5, 0.0, 0.1), 2000)
    orders = collections.Counter(tuple(step.name for step in steps) for steps in drawn)
    assert len(orders) == 6  # three of the four are on
    assert min(orders.values()) > 200
    ranges = {"Brightness": (0.6, 1.4), "Contrast": (0.0, 2.5), "Hue": (-0.1, 0.1)}
    for name, (low, high) in ranges.items():
        values = [step.args[0] for steps in drawn for step in steps if step.name == name]
        assert low <= min(values) < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < max(values) <= high
        assert np.mean(values) == pytest.approx((low + high) / 2, abs=0.04 * (high - low))


# ------------------------------------------------------------------------------------- all alike


@pytest.mark.parametrize("text", [RECIPE, "rand-tweights-n5-p1", "v0-mstd1", "trivial-wide", "3a"])
def test_the_same_random_numbers_give_the_same_image(text):
    rng = np.random.default_rng(3)
    photo = Image.fromarray(rng.integers(0, 256, (33, 47, 3), dtype=np.uint8))
    policy = parse_policy(text, (0.4, 0.4, 0.4, 0.1))
    first, again, other = (draws(policy, 40, "random", seed) for seed in (7, 7, 8))
    assert first == again != other
    for steps in first:
        got = apply_operations(photo, steps, fill=(1, 2, 3))
        assert got.size == photo.size
        want = photo
        for step in steps:
            want = augment_op(
                want, step.name, *step.args, fill=step.fill or (1, 2, 3),
                interpolation=step.interpolation,
            )  # fmt: skip
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("text", ["random-m9", "augmix-m5", "v1", "trivial", "trivial-wide-m3"])
def test_other_policies_are_refused_with_those_that_there_are(text):
    with pytest.raises(
        ValueError,
        match=f"augment.auto_augment='{text}' is not understood; choose one of rand-m9-mstd0.5-inc1"
        ".*original, originalr, v0, v0r, 3a, trivial-wide, or '' for none",
    ):
        parse_policy(text)
