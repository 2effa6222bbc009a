"""Fields of a Variant are checked like settings, before anything is built."""

import dataclasses
import math

import numpy as np
import pytest

import hybrid_flax
from hybrid_flax.errors import InputError
from hybrid_flax.models.variants import with_overrides

ONE_OF_EACH = (
    "gcvit_xxt",
    "l2vit_t",
    "glnet_4g",
    "ga_convnext_t",
    "ga_cswin_t",
    "ga_resnet50",
    "ga_vit_s",
    "unified_swin_micro",
)
SENSELESS = (
    -1,
    10**30,
    1.5,
    math.nan,
    math.inf,
    "many",
    (),
    (1, 2),
    (0,) * 4,
    ("a",) * 4,
    {},
    b"1",
)
FIELDS = [
    (name, field.name)
    for name in ONE_OF_EACH
    for field in dataclasses.fields(hybrid_flax.model_variant(name))
]


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_no_field_takes_what_makes_no_sense(name, field):
    variant = hybrid_flax.model_variant(name)
    for value in SENSELESS:
        free = isinstance(getattr(variant, field), str) and isinstance(value, str)
        scale = field == "layer_scale" and type(value) in (int, float) and 0 < value < math.inf
        if free or scale:
            continue
        with pytest.raises(InputError, match=f"{name}: {field}=.*: expected "):
            with_overrides(name, variant, {field: value})


@pytest.mark.parametrize("name", hybrid_flax.list_models())
def test_what_was_released_is_allowed(name):
    variant = hybrid_flax.model_variant(name)
    fields = {field.name: getattr(variant, field.name) for field in dataclasses.fields(variant)}
    assert with_overrides(name, variant, fields) == variant


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("gcvit_xxt", {"dim": 16}, "gcvit_xxt: dim=16: expected a multiple of 32"),
        ("gcvit_xxt", {"depths": (1, 1, 1)}, "depths=(1, 1, 1): expected 4 values, each a whole"),
        (
            "glnet_4g",
            {"blocks": ("G", "X", "G", "A")},
            "expected 4 values, each a text of",
        ),
        ("ga_cswin_t", {"dim": 32}, "ga_cswin_t: dim=32: expected a multiple of 64"),
        ("ga_convnext_t", {"dims": (8, 8, 8, 20)}, "the last a multiple of 8 from 32"),
        ("ga_vit_s", {"gram_dim": 20}, "ga_vit_s: gram_dim=20: expected a multiple of 16"),
        (
            "unified_swin_micro",
            {"dims": (32, 32, 32, 40)},
            "multiples of (32, 32, 32, 32)",
        ),
        ("unified_pvt_micro", {"dims": (32, 64, 128, 256)}, "expected multiples of (2, 2, 5, 8)"),
        ("unified_internimage_micro", {"dims": (8,) * 4}, "multiples of (16, 16, 16, 16)"),
        ("unified_convnext_micro", {"dims": (7,) * 4}, "expected multiples of (2, 1, 1, 1)"),
        ("unified_convnext_micro", {"mixer": "conv"}, "mixer='conv': expected one of halonet, pvt"),
        ("l2vit_t", {"detection": 1}, "l2vit_t: detection=1: expected True or False"),
        (
            "l2vit_t",
            {"windows": 7},
            "window, drop_path, detection. Did you mean 'window'?",
        ),
    ],
)
def test_what_does_not_divide_is_refused_by_name(name, fields, message):
    with pytest.raises(InputError) as error:
        hybrid_flax.create_model(name, **fields)
    assert message in str(error.value)


def test_numbers_of_numpy_and_lists_are_taken():
    variant = hybrid_flax.model_variant("l2vit_t")
    found = with_overrides("l2vit_t", variant, {"dim": np.int64(64), "depths": [1, 1, 1, 1]})
    assert (type(found.dim), found.depths) == (int, (1, 1, 1, 1))
