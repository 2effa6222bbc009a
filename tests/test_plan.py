"""The plan: compiled for this machine's eight virtual devices, and what it says when it cannot."""

import importlib.util
import json
import math
import os
import pathlib
import re
import time
from types import SimpleNamespace

import jax
import pytest

from hybrid_flax import plan as planning
from hybrid_flax import step_plan
from hybrid_flax.build import batch_shapes, training_program
from hybrid_flax.costs import compile_only, targets
from hybrid_flax.costs.hlo_text import gathered
from hybrid_flax.costs.plan_text import show
from hybrid_flax.costs.targets import Target, find_target
from hybrid_flax.distributed.mesh import make_mesh
from hybrid_flax.errors import InputError
from hybrid_flax.run.saved_program import load
from hybrid_flax.settings import from_config
from hybrid_flax.step_plan import largest_batch, lower, lower_for, plan
from tests import tiny

HERE = Target("here:8", "v5e", "cpu", jax.devices())


def options(**given):
    names = {"topology": "v5e:2x4", "largest_batch": False, "scaling": False, "quick": False}
    names |= {"json": False, "save": "", "train_images": step_plan.IMAGENET}
    return SimpleNamespace(**names | {"compilation_cache": None} | given)


@pytest.fixture(scope="module")
def step_file(tmp_path_factory):
    return str(tmp_path_factory.mktemp("plan") / "step")


@pytest.fixture(scope="module")
def found(step_file):
    return plan(tiny.gcvit(model__num_classes=10), HERE, save=step_file, train_images=1437)


def test_what_a_plan_knows(found):
    assert found["fits"]
    assert (found["chips"], found["batch_size"], found["batch_per_chip"]) == (8, 256, 32)
    state = found["bytes_of_state"]
    assert state["params"] == state["ema"]
    assert state["opt_state"] == 2 * state["params"] + 8  # two moments, two counters
    assert found["peak_bytes"] > found["temporary_bytes"] > 0
    # The gradients of the parameters are added up over the chips, and little else.
    assert 0.9 < found["collectives"]["within"]["all-reduce"]["bytes"] / state["params"] < 1.01
    assert found["memory_traffic"] > 3 * sum(state.values())
    assert found["largest"][0]["bytes"] >= found["largest"][-1]["bytes"] > 0


def test_the_step_is_saved_for_a_run_of_the_same_config(found, step_file):
    assert 0 < found["saved_bytes"] < os.path.getsize(step_file)
    mesh = make_mesh()
    config = from_config(tiny.gcvit(model__num_classes=10))
    program = training_program(config, mesh, 1437 // 256)
    lowered = program.train_step.lower(program.placed(), batch_shapes(config, mesh))
    compiled, why = load(step_file, lowered, mesh)
    assert (compiled is not None, why) == (True, "")


def test_nothing_is_gathered_where_only_images_are_split(found):
    assert "all-gather" not in found["collectives"]["within"]


def sharded(batch_size: int, **mesh):
    """All weights that are worth it split, and nothing drawn: that would compile for long."""
    plain = {"augment__mix_probability": 0.0, "augment__erasing_probability": 0.0}
    mesh = {f"mesh__{axis}": size for axis, size in mesh.items()}
    return tiny.gcvit(model__num_classes=10, batch_size=batch_size, **plain, **mesh)


def elements(array: str) -> int:
    """Of f32[2,3]: 6."""
    return math.prod(map(int, re.findall(r"\d+", array)[1:]))


@pytest.mark.slow
def test_split_weights_are_gathered_for_their_use(found):
    """One by one; the images, their features, the optimizer and the average never."""
    known, lowered = lower(sharded(64, data=1, fsdp=8), HERE)
    whole = found["bytes_of_state"]
    for part, size in known["bytes_of_state"].items():
        assert part == "step" or whole[part] / 8 < size < whole[part] / 4
    arrays = gathered(lowered.compile().as_text())
    paths = {path for array in arrays for path in array.of}
    assert any(path.startswith("state['params']") for path in paths)
    assert not [path for path in paths if not path.startswith("state['params']")]
    assert all(array.of for array in arrays)  # nothing that was computed


@pytest.mark.kernels
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_the_same_on_tpus():
    program = compile_only.buffer_assignment(lower_for, sharded(64, data=1, fsdp=4), "v5e:2x2", 1)
    assert program.known["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    # TPUs gather in pieces, within products: sizes are known, not origins.
    assert max(elements(array.array) for array in gathered(program.text)) == 256 * 768  # a weight


def test_how_it_is_shown(found):
    text = show(found | {"memory": 16 * 2**30})
    assert "gcvit_xxt on here:8: 8 chips, 256 images a step, 32 on a chip" in text
    assert "of 16.00 GiB: fits, 1" in text
    assert "mesh: data 8\nevery device holds the whole state, 23 MiB\n" in text
    assert "exchanged between chips: all-reduce" in text
    assert "without machine code" not in text
    two = found["collectives"] | {"between": {"all-reduce": {"count": 1, "bytes": 2**21}}}
    text = show(found | {"collectives": two, "slices": 2, "machine_code": False})
    assert "gcvit_xxt on here:8, 2 slices: 8 chips" in text
    assert "exchanged between slices: all-reduce 2.0 MiB (1)" in text
    assert text.endswith("s, without machine code")
    smaller = show(found | {"memory": found["peak_bytes"] - 2**20, "fits": False})
    assert "does not fit by 1.0 MiB" in smaller


@pytest.fixture
def planned(found, monkeypatch):
    """The program for people, without its compiler."""
    monkeypatch.setattr(planning, "set_up", lambda: None)
    monkeypatch.setattr(planning, "find_target", lambda name, num_slices: HERE)
    monkeypatch.setattr(planning, "plan", lambda *_, **__: found)


def test_the_status_says_whether_it_fits(planned, found, monkeypatch):
    assert planning.main(tiny.gcvit(), options()) == 0
    monkeypatch.setattr(planning, "plan", lambda *_, **__: found | {"fits": False})
    assert planning.main(tiny.gcvit(), options()) == 1


def test_json_alone(planned, capsys):
    planning.main(tiny.gcvit(), options(json=True, scaling=True))
    printed = json.loads(capsys.readouterr().out)
    assert printed["scaling"]["weak"][-1]["chips"] == 1024


def test_scaling_is_shown_and_only_for_one_slice(planned, capsys):
    planning.main(tiny.gcvit(), options(scaling=True))
    text = capsys.readouterr().out
    assert "on paper, nothing of it measured" in text
    assert "\n      8      32 " in text
    with pytest.raises(ValueError, match="--scaling starts from one slice that only splits"):
        planning.main(tiny.gcvit(mesh__fsdp=2), options(scaling=True))


def test_this_machine_is_a_topology_too():
    assert len(find_target("cpu:2").devices) == 2
    with pytest.raises(InputError, match="--topology=cpu:9: this machine counts as 8 device"):
        find_target("cpu:9")
    with pytest.raises(InputError, match="--topology=cpu:2x2: this machine counts as 8"):
        find_target("cpu:2x2")


def test_without_machine_code_there_is_nothing_to_save(planned):
    with pytest.raises(InputError, match="--save with --quick"):
        planning.main(tiny.gcvit(), options(save="step", quick=True))


def test_the_slices_are_asked_for(monkeypatch):
    asked = {}

    def describe(**given):
        asked.update(given)
        return SimpleNamespace(devices=jax.devices())

    monkeypatch.setattr(importlib.util, "find_spec", lambda module: True)
    monkeypatch.setattr(targets.topologies, "get_topology_desc", describe)
    assert find_target("v5e:2x2", 2).devices == jax.devices()
    assert asked == {"platform": "tpu", "topology_name": "v5e:2x2", "num_slices": 2}
    asked.clear()
    find_target("v5e:2x4")
    assert asked == {"platform": "tpu", "topology_name": "v5e:2x4"}
    find_target("h200:8", 2)
    assert asked["topology"] == "2x1x8"


def test_the_largest_batch_is_between_one_that_fits_and_one_that_does_not(monkeypatch):
    tried = []

    def fits(config, target, quick):
        tried.append(config.batch_size)
        return {"fits": config.batch_size <= 700}

    monkeypatch.setattr(step_plan, "plan", fits)
    assert largest_batch(tiny.gcvit(), HERE) == 640  # of multiples of 64
    assert len(tried) <= 6
    monkeypatch.setattr(step_plan, "plan", lambda config, target, quick: {"fits": False})
    assert largest_batch(tiny.gcvit(), HERE) == 0


@pytest.mark.parametrize("name", ["", "v5e", "v5e:", "v9:2x2", "v5e:4by4"])
def test_unknown_names_of_topologies(name):
    with pytest.raises(
        ValueError, match=f"--topology={name}: expected a chip and a shape, such as"
    ):
        find_target(name)
    with pytest.raises(ValueError, match="v5p: 2x2x1, 2x2x2, .*8x16x16\n  v6e: 1x1, 2x2"):
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
    monkeypatch.setattr(targets.topologies, "get_topology_desc", refuse)
    with pytest.raises(
        ValueError, match=r"knows no such machines \(bad shape\). Among(.|\n)*v5e: 1x1"
    ):
        find_target("v5e:3x5")


def test_a_batch_that_does_not_split(monkeypatch):
    with pytest.raises(ValueError, match="batch_size=100 cannot be split evenly over 8 devices"):
        plan(tiny.gcvit(batch_size=100), HERE)


class Compiler:
    """Writes what the TPU's compiler does, and then takes its time."""

    def __init__(self, error: str = ""):
        self.error = error

    def compile(self, compiler_options):
        if self.error:
            raise ValueError(self.error)
        folder = pathlib.Path(compiler_options["xla_dump_to"])
        files = {
            "memory-usage-report": "Memory Space: default (color=0)\nTotal bytes: 900 (900B)\n",
            "buffer-assignment": "allocation 3: size 700, page 0, preallocated-temp:\n"
            "allocation 4: size 99, color 1, page 0, preallocated-temp:\n",
        }
        for name, text in files.items():
            (folder / f"a.after_optimizations-{name}.txt").write_text(text)
        whole = "HloModule x\n\nENTRY %main () -> f32[8] {\n}\n\n"
        (folder / "a.after_optimizations_after_buffer_assignment.txt").write_text(whole)
        time.sleep(600)


def lowered(*error: str):
    return {"model": "m"}, Compiler(*error)


def unusable():
    raise InputError("no such thing")


def test_a_program_without_machine_code():
    found = compile_only.buffer_assignment(lowered)
    assert (found.known, found.bytes, found.temporary) == ({"model": "m"}, 900, 700)
    assert found.text.startswith("HloModule x")


def test_a_program_that_its_compiler_refuses():
    with pytest.raises(compile_only.CompilerError, match="ValueError: RESOURCE_EXHAUSTED"):
        compile_only.buffer_assignment(lowered, "RESOURCE_EXHAUSTED: too much")
    with pytest.raises(InputError, match="no such thing"):
        compile_only.buffer_assignment(unusable)


def test_only_the_compilers_of_tpus_can_be_stopped():
    with pytest.raises(InputError, match="--quick: only TPUs' compilers can, not that of here:8"):
        plan(tiny.gcvit(), HERE, quick=True)


def test_the_memory_that_a_program_would_need(monkeypatch):
    def refuse(*_):
        raise compile_only.CompilerError("RESOURCE_EXHAUSTED: Used 20.50G of 15.75G hbm.")

    monkeypatch.setattr(compile_only, "buffer_assignment", refuse)
    monkeypatch.setattr(step_plan, "lower", lambda *_: ({"model": "m"}, None))
    target = HERE._replace(platform="tpu")
    found = plan(tiny.gcvit(), target, quick=True)
    assert found == {"model": "m", "fits": False, "peak_bytes": 20.5 * 2**30}
