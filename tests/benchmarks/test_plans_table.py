"""The table of plans: what is kept and tried again; the page is that of the figures."""

import json
import sys

import pytest

import configs
import hybrid_flax
from benchmarks import plans
from hybrid_flax.errors import InputError

KEPT = {
    "config": "gcvit_xxt",
    "topology": "v5e:16x16",
    "batch_size": 4096,
    "batch_per_chip": 16,
    "bytes_of_state": {"params": 2**20, "opt_state": 2**21, "step": 4},
    "flops_per_chip": 2 * 10**11,
    "kernels": {"kernel": 11, "XLA: too large": 1},
    "fits": True,
    "peak_bytes": 2**30,
    "temporary_bytes": 2**29,
    "collectives": {"within": {"all-reduce": {"count": 1, "bytes": 2**20, "sent": 2**21}}},
}


def test_the_page_is_that_of_the_figures():
    page = plans.table(plans.load())
    assert plans.TABLE.read_text() == page, "stale: run python -m benchmarks.plans --render"


def test_the_page_is_rendered_without_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(plans, "TABLE", tmp_path / "plans.md")
    monkeypatch.setattr(plans, "find_target", None)
    monkeypatch.setattr(sys, "argv", ["plans", "--render"])
    assert plans.main() == 0
    assert plans.TABLE.read_text() == plans.table(plans.load())


def test_every_entry_says_what_made_it():
    for entry in plans.load().values():
        assert {"jax", "libtpu", "commit"} <= set(entry["versions"])
        assert "failed" in entry or entry["peak_bytes"] > sum(entry["bytes_of_state"].values())


def test_all_models_have_their_config_there_small_ones_first():
    names = plans.by_size()
    assert set(hybrid_flax.list_models()) <= set(names)
    assert len(names) == len(set(names))
    assert names.index("gcvit_xxt") < names.index("gcvit_b") < names.index("gcvit_l_512")
    assert plans.by_size("l2vit_?") == ["l2vit_t", "l2vit_s", "l2vit_b"]


def test_rows():
    row = plans._row(KEPT)
    cells = "4096, 16 | 3.0 MiB | 0.50 GiB | 1.00 GiB | yes | 0.20 | all-reduce 1.0 MiB | 11 of 12"
    assert row == f"| `gcvit_xxt` | {cells} |\n"
    large = KEPT | {"fits": False, "fits_in": {"accumulation_steps": 4}}
    assert "| in 4 parts |" in plans._row(large)
    assert "| no |" in plans._row(large | {"fits_in": None})
    failed = {"config": "gcvit_t", "failed": "no compiler"}
    assert plans._row(failed) == "| `gcvit_t` | failed: no compiler ||||||||\n"


def test_what_is_there_is_kept_and_what_failed_is_tried_again(tmp_path, monkeypatch):
    path, compiled = tmp_path / "plans.json", []

    def plan(config, target, quick):
        compiled.append(config.model.name)
        if config.model.name == "gcvit_xt":
            raise RuntimeError("the compiler died\nat length")
        return {name: KEPT[name] for name in list(KEPT)[2:]}

    monkeypatch.setattr(plans, "RESULTS", path)
    monkeypatch.setattr(plans, "TABLE", tmp_path / "plans.md")
    monkeypatch.setattr(plans, "set_up", lambda: None)
    monkeypatch.setattr(plans, "find_target", lambda name: plans.Target(name, "v5e", "tpu", []))
    monkeypatch.setattr(plans, "plan", plan)
    arguments = ["plans", "--configs=gcvit_x*", "--topologies=v5e:16x16"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert plans.main() == 1
    assert compiled == ["gcvit_xxt", "gcvit_xt"]
    entries = json.loads(path.read_text())["plans"]
    assert [entry.get("failed") for entry in entries] == ["RuntimeError: the compiler died", None]
    assert plans.main() == 1
    assert compiled[2:] == ["gcvit_xt"]
    page = (tmp_path / "plans.md").read_text()
    assert "| `gcvit_xxt` | 4096, 16 |" in page
    total = len(plans.by_size())
    assert f"Not compiled yet, {total - 2} of {total}" in page


def test_the_parts_in_which_a_batch_fits(monkeypatch):
    def plan(config, target, quick):
        if config.accumulation_steps > 8:
            raise InputError("cannot be split")
        return {
            "fits": config.accumulation_steps >= fits,
            "accumulation_steps": config.accumulation_steps,
            "peak_bytes": 5,
        }

    monkeypatch.setattr(plans, "plan", plan)
    fits = 4
    found = plans.fitting_parts(configs.load("gcvit_xxt"), None)
    assert found == {"accumulation_steps": 4, "peak_bytes": 5}
    fits = 99
    assert plans.fitting_parts(configs.load("gcvit_xxt"), None) is None


def test_a_missing_compiler_is_said(monkeypatch, capsys):
    def missing(name):
        raise InputError("install libtpu")

    monkeypatch.setattr(plans, "set_up", lambda: None)
    monkeypatch.setattr(plans, "find_target", missing)
    monkeypatch.setattr(sys, "argv", ["plans"])
    assert plans.main() == 2
    assert capsys.readouterr().err == "error: install libtpu\n"


@pytest.mark.parametrize("topology", plans.TOPOLOGIES)
def test_scaling_is_tabulated(topology):
    entry = KEPT | {"config": "gcvit_b", "topology": topology, "memory_traffic": 3 * 10**9}
    page = plans.table({("gcvit_b", topology): entry})
    assert f"**gcvit_b**, {topology}, from a step of 16 images per chip" in page
    assert "| 1024 | 4, " in page
