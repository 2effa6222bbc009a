import numpy as np
import pytest
from PIL import Image

from hybrid_flax.data.augmentation.operations import (
    Operation,
    apply_operations,
    augment_op,
    draw_interpolation,
    fill_colour,
)


def one_colour(*rgb):
    return Image.new("RGB", (4, 4), rgb)


def result(photo, name, *args, **options):
    return np.asarray(augment_op(photo, name, *args, **options))


def columns(count=8):
    """Column x has the value 10·x; rows are alike."""
    row = np.arange(count, dtype=np.uint8) * 10
    return Image.fromarray(np.broadcast_to(row[None, :, None], (count, count, 3)).copy())


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("Posterize", (1.0,), (128, 0, 0)),
        ("Posterize", (0,), (0, 0, 0)),
        ("Posterize", (-1,), (0, 0, 0)),
        ("Posterize", (8,), (200, 100, 50)),
        ("Solarize", (256,), (200, 100, 50)),
        ("Solarize", (100.0,), (55, 155, 50)),
        ("SolarizeAdd", (33.0,), (200, 133, 83)),
        ("SolarizeAdd", (200,), (200, 255, 250)),
        ("Brightness", (0.5,), (100, 50, 25)),
        ("Color", (0.0,), (124, 124, 124)),  # 0.299·200 + 0.587·100 + 0.114·50 = 124.2
        ("Hue", (0.0,), (200, 100, 50)),
        ("Invert", (), (55, 155, 205)),
    ],
)
def test_what_colour_operations_make_of_one_colour(name, args, expected):
    got = result(one_colour(200, 100, 50), name, *args)
    assert np.abs(got.astype(int) - expected).max() <= (1 if name == "Hue" else 0), got[0, 0]


def test_a_third_of_a_turn_makes_red_green():
    red, green = result(one_colour(255, 0, 0), "Hue", 1 / 3), (0, 255, 0)
    assert np.abs(red[0, 0].astype(int) - green).max() <= 3


def test_blur_spreads_a_dot_and_keeps_its_light():
    photo = np.zeros((21, 21, 3), np.uint8)
    photo[10, 10] = 255
    got = result(Image.fromarray(photo), "GaussianBlur", 1.0)[:, :, 0].astype(float)
    assert got[10, 10] == pytest.approx(255 / (2 * np.pi), rel=0.15)  # the Gaussian's peak
    assert got.sum() == pytest.approx(255, rel=0.1)
    np.testing.assert_allclose(got, got.T, atol=1)


def test_translations_move_left_for_positive_amounts_and_fill():
    want = [20, 30, 40, 50, 60, 70, 9, 9]
    for name, amount in (("TranslateX", 0.25), ("TranslateXPixels", 2)):
        got = result(columns(), name, amount, fill=(9, 9, 9), interpolation="nearest")
        assert got[3, :, 0].tolist() == want
    turned = columns().transpose(Image.Transpose.TRANSPOSE)
    for name, amount in (("TranslateY", 0.25), ("TranslateYPixels", 2)):
        got = result(turned, name, amount, fill=[9, 9, 9], interpolation="nearest")
        assert got[:, 3, 0].tolist() == want


def test_shear_moves_every_row_by_its_own_amount():
    got = result(columns(), "ShearX", 1.0, fill=(9, 9, 9), interpolation="nearest")
    # Of a row's middle: row 0 by 0.5, which with a column's own 0.5 is the next one.
    assert got[0, :, 0].tolist() == [10, 20, 30, 40, 50, 60, 70, 9]
    assert got[3, :, 0].tolist() == [40, 50, 60, 70, 9, 9, 9, 9]


def test_operations_are_applied_in_turn_and_know_whether_they_move_pixels():
    steps = [Operation("Invert"), Operation("SolarizeAdd", (10,)), Operation("Invert")]
    got = np.asarray(apply_operations(one_colour(200, 100, 50), steps, fill=(0, 0, 0)))
    assert got[0, 0].tolist() == [190, 100, 50]  # 55 + 10 inverted; 155 and 205 stay
    assert not any(step.is_geometric for step in steps)
    assert Operation("Rotate", (3,)).is_geometric
    assert Operation("TranslateYPixels", (3,)).is_geometric


def test_an_operation_may_bring_its_own_fill():
    away = Operation("TranslateX", (1.0,), "nearest")
    for step, colour in ((away, 7), (away._replace(fill=(0, 0, 0)), 0)):
        got = np.asarray(apply_operations(one_colour(200, 100, 50), [step], fill=(7, 7, 7)))
        assert np.unique(got).tolist() == [colour]


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
