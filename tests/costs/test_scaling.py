"""The model of a step's time, by hand."""

import pytest

from hybrid_flax.costs.chips import Chip
from hybrid_flax.costs.scaling import (
    NETWORKS,
    Assumed,
    Network,
    Work,
    of_plan,
    scale,
    step_times,
    work_of,
)

CHIP = Chip(flops=100.0, bandwidth=10.0)
NETWORK = Network(within=5.0, between=1.0, chips=16, source="here")
WORK = Work(flops_per_image=50.0, bytes_per_image=3.0, bytes_per_step=20.0, reduced_bytes=40.0)
WHOLE = Assumed(1.0, 1.0, 1.0)


def test_the_times_of_a_step():
    times = step_times(WORK, 8, 10, CHIP, NETWORK, WHOLE)
    # 500 operations at 100; 30 + 20 bytes at 10; 2 · 7/8 · 40 bytes at 5.
    assert times == (5.0, 5.0, 14.0, 0.0)
    assert times.step == 19.0
    # Half of every speed is twice the time.
    assert step_times(WORK, 8, 10, CHIP, NETWORK, Assumed(0.5, 0.5, 0.5)).step == 38.0


def test_between_slices_each_chip_passes_on_its_share():
    times = step_times(WORK, 64, 10, CHIP, NETWORK, WHOLE)
    # Four slices of 16: 2 · 15/16 · 40 bytes at 5, then 2 · 3/4 · 40/16 bytes at 1.
    assert times.within == pytest.approx(15.0)
    assert times.between == pytest.approx(3.75)
    assert step_times(WORK, 64, 10, CHIP, NETWORK._replace(between=None), WHOLE) is None


def test_strong_scaling_ends_at_one_image_per_chip_and_weak_does_not():
    tables = scale(WORK, 64, 10, CHIP, NETWORK)
    assert [row["chips"] for row in tables["strong"]] == [8, 16, 32, 64]
    assert [row["images_per_chip"] for row in tables["strong"]] == [8, 4, 2, 1]
    assert [row["chips"] for row in tables["weak"]] == [8, 16, 32, 64, 128, 256, 512, 1024]
    assert [row["slices"] for row in tables["weak"]][:4] == [1, 1, 2, 4]
    first, *_, last = tables["weak"]
    assert first["efficiency"] == 1
    speed = last["images_per_second"] / first["images_per_second"]
    assert last["efficiency"] == pytest.approx(speed / 128)
    assert first["step_milliseconds"] == pytest.approx(1e3 * 80 / first["images_per_second"])


def test_the_work_of_a_plan():
    found = {
        "batch_size": 64,
        "batch_per_chip": 8,
        "flops_per_chip": 400,
        "memory_traffic": 1000,
        "bytes_of_state": {"params": 10, "opt_state": 20, "step": 4},
        "collectives": {"within": {"all-reduce": {"count": 2, "bytes": 30, "sent": 60}}},
    }
    assert work_of(found) == Work(50.0, (1000 - 2 * 34 - 2 * 10) / 8, 2 * 34 + 2 * 10, 30)
    assert of_plan(found, "h200")["weak"][0]["images_per_chip"] == 8


def test_the_datasheets_say_where_they_are():
    assert {name: network.within / 1e9 for name, network in NETWORKS.items()} == {
        "v4": 300,
        "v5e": 200,
        "v5p": 600,
        "v6e": 400,
        "h200": 450,
    }
    assert NETWORKS["v5e"].between == 3.125e9
    assert all(network.source for network in NETWORKS.values())
