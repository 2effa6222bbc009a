"""The plan: compiled for this machine's eight virtual devices, and what it says when it cannot."""

import importlib.util
import json
from types import SimpleNamespace

import pytest

from hybrid_flax import plan as planning
from hybrid_flax.distributed.mesh import make_mesh
from hybrid_flax.plan import Target, collectives, find_target, largest, largest_batch, plan, show
from tests import tiny

HERE = Target("here:8", "v5e", "cpu", make_mesh())


@pytest.fixture(scope="module")
def found():
    return plan(tiny.config(model__num_classes=10), HERE)


def test_what_a_plan_knows(found):
    assert found["fits"]
    assert (found["chips"], found["batch_size"], found["batch_per_chip"]) == (8, 256, 32)
    state = found["bytes_of_state"]
    assert state["params"] == state["ema"]
    assert state["opt_state"] == 2 * state["params"] + 8  # two moments, two counters
    assert found["peak_bytes"] > found["temporary_bytes"] > 0
    # The gradients of the parameters are added up over the chips, and little else.
    assert 0.9 < found["collectives"]["all-reduce"]["bytes"] / state["params"] < 1.01
    assert found["largest"][0]["bytes"] >= found["largest"][-1]["bytes"] > 0


def test_how_it_is_shown(found):
    text = show(found | {"memory": 16 * 2**30})
    assert "gcvit_xxt on here:8: 8 chips, 256 images a step, 32 on a chip" in text
    assert "of 16.00 GiB: fits, 1" in text
    assert "between chips: all-reduce" in text
    smaller = show(found | {"memory": found["peak_bytes"] - 2**20, "fits": False})
    assert "does not fit by 1.0 MiB" in smaller


def test_the_figures_are_written_and_the_status_says_whether_it_fits(found, tmp_path, monkeypatch):
    monkeypatch.setattr(planning, "find_target", lambda name: HERE)
    monkeypatch.setattr(planning, "plan", lambda config, target: found | {"fits": False})
    file = tmp_path / "plan.json"
    options = SimpleNamespace(topology="here:8", largest_batch=False, json=str(file))
    assert planning.main(tiny.config(), options) == 1
    assert json.loads(file.read_text())["model"] == "gcvit_xxt"


def test_the_largest_batch_is_between_one_that_fits_and_one_that_does_not(monkeypatch):
    tried = []

    def fits(config, target):
        tried.append(config.batch_size)
        return {"fits": config.batch_size <= 700}

    monkeypatch.setattr(planning, "plan", fits)
    assert largest_batch(tiny.config(), HERE) == 640  # of multiples of 64
    assert len(tried) <= 6
    monkeypatch.setattr(planning, "plan", lambda config, target: {"fits": False})
    assert largest_batch(tiny.config(), HERE) == 0


PROGRAM = """
  %ar = (f32[16,8]{1,0:T(8,128)S(1)}, /*index=1*/bf16[4]{0}) all-reduce(%a, %b), channel_id=1
  %ag = (f32[2,8]{1,0}, f32[16,8]{1,0}) all-gather-start(%c), dimensions={0}
  %done = f32[16,8]{1,0} all-gather-done(%ag)
  %own = f32[99]{0} all-reduce(%e), replica_groups={{0},{1}}, to_apply=%sum
  ROOT %big = bf16[64,64]{1,0} fusion(%d), kind=kLoop, metadata={op_name="jit(step)/stem/conv"}
"""


def test_collectives_are_counted_with_their_bytes():
    assert collectives(PROGRAM) == {
        "all-reduce": {"count": 1, "bytes": 16 * 8 * 4 + 4 * 2},
        "all-gather": {"count": 1, "bytes": 16 * 8 * 4},
    }


def test_the_largest_arrays_say_where_they_come_from():
    first, second, _ = largest(PROGRAM)
    assert first == {"array": "bf16[64,64]", "by": "stem/conv", "bytes": 64 * 64 * 2}
    assert second["by"] == "all-gather-done"


@pytest.mark.parametrize("name", ["", "v5e", "v5e:", "v9:2x2", "v5e:4by4"])
def test_unknown_names_of_topologies(name):
    with pytest.raises(
        ValueError, match=f"--topology={name}: expected a chip and a shape, such as"
    ):
        find_target(name)


@pytest.mark.parametrize(
    ("name", "install"), [("v5e:4x4", "install libtpu"), ("h200:8", r'install "jax\[cuda13\]"')]
)
def test_a_missing_compiler_is_named_with_the_command(name, install, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    with pytest.raises(ValueError, match=f"not installed here. Install it, .*{install}"):
        find_target(name)


def test_a_shape_that_the_compiler_does_not_know(monkeypatch):
    def refuse(**_):
        raise ValueError("bad shape\nand more")

    monkeypatch.setattr(importlib.util, "find_spec", lambda module: True)
    monkeypatch.setattr(planning.topologies, "get_topology_desc", refuse)
    with pytest.raises(ValueError, match=r"knows no such machines \(bad shape\). Among"):
        find_target("v5e:3x5")


def test_a_batch_that_does_not_split(monkeypatch):
    with pytest.raises(ValueError, match="batch_size=100 cannot be split evenly over 8 devices"):
        plan(tiny.config(batch_size=100), HERE)
