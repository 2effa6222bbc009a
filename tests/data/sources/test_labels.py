import numpy as np
import pytest

from hybrid_flax.data.sources.labels import check_label_range, class_number
from hybrid_flax.errors import InputError


@pytest.mark.parametrize(
    "value", [7, np.uint8(7), 7.0, np.float32(7), "7", "007\n", " 7.0 ", "+7", b"\xef\xbb\xbf7\r\n"]
)
def test_class_numbers_however_they_are_written(value):
    found = class_number(value, "0.cls")
    assert (found, type(found)) == (7, int)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("n01440764", "'n01440764'"),
        (b"\xff", r"b'\\xff'"),
        ("", "''"),
        (-1, "-1"),
        (True, "True"),
        (2.5, "2.5"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        ("1e3", "'1e3'"),
        ("\u0663", "'\u0663'"),
        ([3], r"\[3\]"),
        (None, "None"),
        ({"a": 1}, "{'a': 1}"),
    ],
)
def test_what_is_no_class_number_is_shown(value, shown):
    with pytest.raises(InputError, match=f"^0.cls: the label is {shown}; expected a class number"):
        class_number(value, "0.cls")


@pytest.mark.parametrize("value", ["9" * 9_999, 10**9_999, 10**30, 1e300, 2**63], ids=range(5))
def test_huge_numbers_are_refused_without_being_converted(value):
    with pytest.raises(InputError, match="a class number of at most 18 digits") as error:
        class_number(value, "0.cls")
    assert len(str(error.value)) < 300


def test_a_limit_is_said():
    assert class_number("4", "0.cls", limit=5) == 4
    with pytest.raises(InputError, match="the label is 5; expected a class number from 0 to 4"):
        class_number(5, "0.cls", limit=5)


def test_labels_far_above_the_number_of_images_are_refused_by_image():
    check_label_range(np.array([], int), str, "set")
    check_label_range(np.array([0, 21_842]), str, "set")  # some images of a large set
    check_label_range(np.arange(200_000), str, "set")
    with pytest.raises(InputError, match=r"set: 1.png has the label 999999999.* of 2 images"):
        check_label_range(np.array([0, 999_999_999]), "{}.png".format, "set")
