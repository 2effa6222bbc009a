"""Who decides whether equal blocks run as a loop."""

import types

import numpy as np
import pytest

from benchmarks import scan_blocks
from hybrid_flax import scan_choice
from hybrid_flax.scan_choice import scans
from hybrid_flax.settings import Model


def model(scan_blocks: str) -> Model:
    return Model(name="gcvit_b", image_size=224, drop_path=0.0, scan_blocks=scan_blocks)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "another"])
def test_what_is_asked_for_wins_and_auto_knows_platforms(platform, monkeypatch):
    monkeypatch.setattr(scan_choice, "PLATFORMS", frozenset({"tpu"}))
    device = types.SimpleNamespace(platform=platform)
    mesh = types.SimpleNamespace(devices=np.array([device], dtype=object))
    assert scans(model("on"), mesh)
    assert not scans(model("off"), mesh)
    assert scans(model("auto"), mesh) == (platform == "tpu")


def test_platforms_are_those_where_every_measured_step_gains():
    entries = scan_blocks.load()
    gains: dict[str, list[bool]] = {}
    for name, target, scan in entries:
        if scan == "on":
            found = scan_blocks.ratios(entries[name, target, "off"], entries[name, target, "on"])
            enough = found["compile"] >= 2.5 and found["memory"] <= 1.03
            enough &= found.get("traffic", float("inf")) <= 1.03
            gains.setdefault("cpu" if target == "cpu" else "tpu", []).append(enough)
    assert {name for name, enough in gains.items() if all(enough)} == scan_choice.PLATFORMS
