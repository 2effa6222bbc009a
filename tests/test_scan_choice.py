"""Who decides whether equal blocks run as a loop."""

import types

import jax
import numpy as np
import pytest

from hybrid_flax.distributed.mesh import make_mesh
from hybrid_flax.scan_choice import AUTO, scans
from hybrid_flax.settings import Model


def model(scan_blocks: str) -> Model:
    return Model(name="gcvit_b", image_size=224, drop_path=0.0, scan_blocks=scan_blocks)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "gpu", "another"])
def test_what_is_asked_for_wins_and_auto_reads_the_table(platform):
    device = types.SimpleNamespace(platform=platform)
    mesh = types.SimpleNamespace(devices=np.array([device], dtype=object))
    assert scans(model("on"), mesh)
    assert not scans(model("off"), mesh)
    assert scans(model("auto"), mesh) == (platform in AUTO and AUTO[platform].scan)


def test_the_platform_is_that_of_the_mesh():
    assert scans(model("auto"), make_mesh(jax.devices()[:1])) == AUTO["cpu"].scan
