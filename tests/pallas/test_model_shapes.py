"""Every window of every model at 224 pixels: TPU kernels, interpreted, and the definition."""

import dataclasses
import functools

import pytest

from pallas.dispatch import choose
from pallas.tiles import tpu as tpu_tiles
from tests.pallas.cases import differences, kernels, model_geometries

# Families share shapes.
differences = functools.cache(differences)
FAMILIES = ("gcvit_*", "l2vit_*", "ga_cswin_*", "unified_swin_*", "unified_halonet_*")
SMALLEST = ("unified_swin_micro",)


@pytest.mark.parametrize(
    "family", [*SMALLEST, *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES)]
)
def test_every_shape_agrees_with_the_definition(family, monkeypatch):
    # One window at a time in the schedule compiles in half the time; the odd shapes have more.
    monkeypatch.setattr(tpu_tiles, "UNROLLED_TOKENS", 1)
    geometries, wrong = model_geometries(family), {}
    assert geometries
    for geometry in geometries:
        trained = dataclasses.replace(geometry, dtype="bfloat16")
        assert choose("auto", "tpu", trained, kernels(trained)) == (
            "tpu",
            "one pass over the map",
        ), geometry
        distances = differences(geometry)
        if max(distances) > 1e-5:
            wrong[geometry] = distances
    assert not wrong
