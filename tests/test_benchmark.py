"""What the benchmarks say and refuse; never how fast anything was."""

import dataclasses
import json
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from benchmarks import deformable_conv as deformable
from benchmarks import depthwise, operation
from benchmarks import window_attention as windows
from hybrid_flax import benchmark
from hybrid_flax.costs import chips, timing
from hybrid_flax.costs.subjects import Subject, describe
from hybrid_flax.models import l2vit
from hybrid_flax.settings import Loss
from hybrid_flax.training.losses import make_loss
from pallas.deformable_conv.geometry import Sampling
from pallas.dispatch import recorded
from pallas.window_attention import tpu as window_tpu
from pallas.window_attention import window_attention
from pallas.window_attention.geometry import Windows

ROOT = pathlib.Path(__file__).parents[1]
TINY = dataclasses.replace(l2vit.VARIANTS["l2vit_t"], dim=32, depths=(1, 1, 1, 1))


# ------------------------------------------------------------------------------- what both share


def test_subjects_take_turns_and_failures_are_left_out():
    order = []

    def subject(name, fails_at=None):
        def run():
            order.append(name)
            if order.count(name) == fails_at:
                raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9G")

        return lambda: run

    def broken():
        raise ValueError("no such kernel\nand much more")

    builders = {"a": subject("a"), "b": subject("b", fails_at=3), "c": broken}
    compared = timing.compare(builders, turns=3)
    assert "".join(order) == "ababab" + "a"  # once to warm up, then in turns; b left in the second
    assert set(compared.seconds) == {"a"}
    assert compared.failed == {"b": timing.OUT_OF_MEMORY, "c": "ValueError: no such kernel"}


def test_medians_are_of_one_execution(monkeypatch):
    clock = iter([0, 6, 10, 12, 20, 60])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    compared = timing.compare({"a": lambda: lambda: None}, turns=3, repeats=2)
    assert compared.seconds == {"a": 3.0}


def test_nothing_but_jax_flax_and_optax_is_imported():
    missing = "torch", "timm", "ml_collections", "grain", "tensorflow_datasets", "clu"
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({missing}))\n"
        "import benchmarks.depthwise\n"
        "import benchmarks.window_attention, benchmarks.deformable_conv\n"
        "import hybrid_flax.benchmark as benchmark\n"
        "sys.exit(benchmark.main(['--model=gcvit_b', '--against=torch:timm/gcvit_base']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert "needs torch and timm: pip install torch timm" in done.stderr, done.stderr
    assert done.returncode == 2


# -------------------------------------------------------------------- depthwise convolution


def test_depthwise_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(depthwise, "SHAPES", ((2, 6, 8, 3),))
    file = tmp_path / "depthwise.json"
    assert depthwise.main([f"--save={file}"]) == 0
    record = json.loads(file.read_text())
    assert [(row["shape"], row["pass"]) for row in record["rows"]] == [
        ([2, 6, 8, 3], "forward"),
        ([2, 6, 8, 3], "forward + backward"),
    ]
    for row in record["rows"]:
        assert set(row["seconds"]) == {"shifted_sum", "grouped_conv", "pytorch"}
        assert not row["failed"]
    assert "2×6×6×8, 3×3" in capsys.readouterr().out
    assert depthwise.main(["--save=nowhere/x.json"]) == 2
    assert "there is no folder nowhere" in capsys.readouterr().err


# --------------------------------------------------------------------- attention in windows

# H200, 128 images, bfloat16, microseconds: worked out by hand from bytes and datasheet.
FLOORS = {
    "gcvit_b s1 local": 85.6,
    "gcvit_b s1 global": 64.6,
    "gcvit_b s2 global": 32.8,
    "gcvit_b s3 local": 21.4,
    "gcvit_b s4 global": 10.7,
    "unified_swin_base s2 shifted": 42.8,
    "ga_cswin_s s1 vertical": 42.8 / 2,  # of the two directions
    "ga_cswin_s s4": 5.4,
    "unified_halonet_base s1": 85.6,
}


@pytest.mark.parametrize("name", FLOORS)
def test_floors(name):
    chip = chips.CHIPS["NVIDIA H200"]
    work = windows.work(windows.shapes("bfloat16")[name], 128)
    forward, both = operation.floor(work, chip).values()
    assert 1e6 * forward == pytest.approx(FLOORS[name], abs=0.06)
    assert both == pytest.approx(3 * forward)  # twice the bytes come back


def test_every_shape_is_one_that_the_operation_takes():
    known = windows.shapes("bfloat16")
    assert len(known) == 30
    for geometry in known.values():
        arguments = windows.argument_shapes(geometry, batch=2)
        with recorded() as calls:
            out = jax.eval_shape(lambda x, g=geometry: windows.operation(g, "auto")(**x), arguments)
        assert [seen for seen, _ in calls] == [geometry]
        assert out.shape == (2, geometry.height, geometry.width, geometry.heads, geometry.dim)


@pytest.mark.parametrize(
    "model", ["gcvit_b", "unified_swin_base", "ga_cswin_s", "l2vit_b", "unified_halonet_base"]
)
def test_the_shapes_are_those_of_the_models(model):
    with recorded() as calls:
        Subject("", model, image_size=None, dtype="bfloat16").multiply_adds()
    known = windows.shapes("bfloat16")
    table = {known[name] for name in known if name.startswith(model)}
    assert table <= {geometry for geometry, _ in calls}


@pytest.mark.parametrize(
    "name",
    [
        "gcvit_b s4 local",
        "gcvit_b s3 global",
        "unified_swin_base s3 shifted",
        "ga_cswin_s s3 vertical",
        "l2vit_b s3",
        "unified_halonet_base s3",
    ],
)
def test_pytorch_computes_the_same(name):
    geometry = dataclasses.replace(windows.shapes("float32")[name], heads=2)
    differences = differences_of_pytorch(windows.BENCHMARK, geometry)
    assert differences.pop("out") < 1e-6
    assert max(differences.values()) < 2e-6, differences


def differences_of_pytorch(of: operation.Benchmark, geometry) -> dict[str, float]:
    """Relative L2 distances of its result and gradients from XLA's."""
    arguments = of.random_arguments(geometry, batch=2)
    ours = operation.call(of.operation(geometry, "xla"), backward=True)
    out, grads = jax.jit(ours)(arguments)
    theirs = {key: torch.tensor(np.asarray(x)) for key, x in arguments.items()}
    their_out_grad = theirs.pop("out_grad")
    leaves = [array.requires_grad_() for array in theirs.values()]
    their_out = of.torch_operation(geometry, "cpu", torch.float32)(**theirs)
    their_grads = torch.autograd.grad(their_out, leaves, their_out_grad)

    def difference(ours, theirs):
        ours, theirs = np.asarray(ours), theirs.detach().numpy()
        return np.linalg.norm(theirs - ours) / np.linalg.norm(ours)

    pairs = zip(theirs, their_grads, strict=True)
    return {"out": difference(out, their_out)} | {
        key: difference(grads[key], their_grad) for key, their_grad in pairs
    }


def test_windows_command(tmp_path, capsys):
    file = tmp_path / "windows.json"
    assert windows.main(["--shapes=gcvit_b s4 l", f"--save={file}"]) == 0
    printed = capsys.readouterr().out
    assert "cpu, 1 images, float32" in printed
    assert "only XLA is timed" in printed
    assert "gcvit_b s4 local  (auto: XLA, there is no kernel for platform cpu)" in printed
    record = json.loads(file.read_text())
    assert record["versions"]["jax"] == jax.__version__
    assert {"machine", "device", "batch", "dtype"} < record.keys()
    (row,) = record["rows"].values()
    assert row["geometry"]["window"] == [7, 7]
    for figures in row["passes"].values():
        assert set(figures["seconds"]) == {"xla"}
        assert not figures["failed"]


def test_floors_and_ratios_are_shown():
    passes = {
        "forward": {"seconds": {"pallas": 2e-4, "xla": 3e-4}, "failed": {}, "floor": 1e-4},
        "forward + backward": {
            "seconds": {"pallas": 8e-4},
            "failed": {"xla": "out of memory"},
            "floor": 3e-4,
        },
    }
    shown = operation.show("name", {"auto": {"kernel": "gpu", "why": "faster"}, "passes": passes})
    assert [" ".join(line.split()) for line in shown.splitlines()] == [
        "name (auto: gpu, faster)",
        "forward floor 100.0 pallas 200.0 (2.0× floor) xla 300.0 (3.0× floor, 1.50× pallas)",
        "forward + backward floor 300.0 pallas 800.0 (2.7× floor) xla: out of memory",
        "of it backward floor 200.0 pallas 600.0 (3.0× floor)",
    ]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--shapes=vit_h", "--shapes=vit_h: no shape has this in its name; there are ga_cswin_s"),
        ("--save=nowhere/x.json", "--save=nowhere/x.json: there is no folder nowhere; make it"),
        ("--batch=none", "argument --batch: 'none': expected a whole number above 0"),
    ],
)
def test_windows_command_refuses(argument, message, capsys):
    assert _status(windows.main, [argument]) == 2
    assert message in capsys.readouterr().err


def _status(main, arguments):
    try:
        return main(arguments)
    except SystemExit as error:  # argparse's own
        return error.code


# ------------------------------------------------------------------------- deformable sampling


@pytest.mark.parametrize(
    ("chip", "floors"), [("NVIDIA H200", (96.8, 140.5)), ("TPU v4", (310.7, 548.3))]
)
def test_sampling_floors(chip, floors):
    """128 images, bfloat16, microseconds of forward and of backward, worked out by hand.

    Stage 1 moves 382 and 674 MB and gathers 3.24 GB in each pass, which takes an H200 96.8; every
    further stage does half as much.
    """
    for stage, geometry in enumerate(deformable.shapes("bfloat16").values()):
        work = deformable.work(geometry, 128)
        forward, both = operation.floor(work, chips.CHIPS[chip]).values()
        times = [1e6 * 2**stage * seconds for seconds in (forward, both - forward)]
        assert times == pytest.approx(floors, abs=0.06)


def test_the_sampled_shapes_are_those_of_the_model():
    with recorded() as calls:
        Subject("", "unified_internimage_base", image_size=None, dtype="bfloat16").multiply_adds()
    assert set(deformable.shapes("bfloat16").values()) == {geometry for geometry, _ in calls}


@pytest.mark.parametrize("stage", ["s3", "s4"])
def test_pytorch_samples_the_same(stage):
    geometry = deformable.shapes("float32")[f"unified_internimage_base {stage}"]
    geometry = dataclasses.replace(geometry, groups=2)
    differences = differences_of_pytorch(deformable.BENCHMARK, geometry)
    assert max(differences.values()) < 1e-4, differences


def test_sampling_command(tmp_path, capsys):
    file = tmp_path / "sampling.json"
    assert deformable.main(["--shapes=s4", f"--save={file}"]) == 0
    printed = capsys.readouterr().out
    assert (
        "unified_internimage_base s4  (auto: XLA, there is no kernel for platform cpu)" in printed
    )
    record = json.loads(file.read_text())
    assert record["inputs"]["offsets"] == "normal, standard deviation 1 pixel"
    assert record["batch"] == 1
    (row,) = record["rows"].values()
    assert row["geometry"]["groups"] == 56
    for figures in row["passes"].values():
        assert set(figures["seconds"]) == {"xla"}
        assert not figures["failed"]


def test_sampling_command_refuses(capsys):
    assert deformable.main(["--shapes=s5"]) == 2
    message = "--shapes=s5: no shape has this in its name; there are unified_internimage_base s1"
    assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------ whole models


def test_recorded_lists_what_is_traced():
    qkv = jax.ShapeDtypeStruct((2, 8, 8, 3, 4, 32), jnp.bfloat16)

    def twice(qkv):
        return [window_attention(qkv, window=4, implementation=how) for how in ("auto", "xla")]

    with recorded() as calls:
        jax.eval_shape(twice, qkv)
    jax.eval_shape(twice, qkv)  # afterwards: not listed
    (geometry, automatic), (same, plain) = calls
    assert geometry == same == Windows(8, 8, 4, 32, (4, 4), "bfloat16")
    assert automatic["tpu"].kernel == "tpu"
    assert plain["tpu"] == (None, "asked for")
    assert set(plain) == {"tpu", "cuda", "cpu"}


def test_what_serves_deformable_sampling_is_listed():
    options = SimpleNamespace(
        model="unified_internimage_micro", image_size=32, dtype="float32", scan_blocks="auto"
    )
    listed = benchmark.make_ours(options, "ours", "pallas").operations()
    assert [(entry["count"], entry["shape"]) for entry in listed] == [
        (2, "8×8, 2 groups of 16, 9 movable points"),
        (2, "4×4, 4 groups of 16, 9 movable points"),
        (9, "2×2, 8 groups of 16, 9 movable points"),
        (2, "1×1, 16 groups of 16, 9 movable points"),
    ]
    assert {entry["kernel"] for entry in listed} == {"tpu interpreted"}
    other = Sampling(9, 8, 5, 4, 2, 8, 3, "float32", 2, dilations=(1, 2), remove_center=True)
    assert describe(other) == (
        "9×8, 2 groups of 8, 8 movable points, stride 2, dilated by 1/2, without centre"
    )


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(l2vit.VARIANTS, "l2vit_t", TINY)
    return ["--model=l2vit_t", "--image_size=32", "--dtype=float32", "--steps=2"]


def test_model_command(tiny, tmp_path, capsys):
    file = tmp_path / "model.json"
    assert benchmark.main([*tiny, "--batch_sizes=2", f"--save={file}"]) == 0
    record = json.loads(file.read_text())
    same = Subject("", "l2vit_t", image_size=32, dtype="bfloat16")
    assert record["multiply_adds"] == same.multiply_adds()
    assert record["parameters"] == same.parameters() < 2e6
    assert [(row["batch"], row["pass"], row["who"]) for row in record["rows"]] == [
        (2, "inference", "ours"),
        (2, "training", "ours"),
    ]
    for row in record["rows"]:
        assert row["images_per_second"] == pytest.approx(2 / row["seconds"])
        assert row["bytes"] > 4 * record["parameters"]
        assert row["mfu"] is None  # of a CPU
    training = record["rows"][1]
    assert training["bytes"] > 4 * 4 * record["parameters"]  # weights, gradients, two moments
    printed = capsys.readouterr().out
    assert "l2vit_t on cpu, float32" in printed
    assert len(printed.splitlines()) == 4 + len(record["operations"])


def test_against_xla(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "PASSES", {"inference": 2})
    file = tmp_path / "model.json"
    assert benchmark.main([*tiny, "--batch_sizes=1", "--against=xla", f"--save={file}"]) == 0
    record = json.loads(file.read_text())
    ours, xla = record["rows"]
    assert (ours["who"], xla["who"]) == ("ours", "xla")
    assert xla["ours_is_faster"] == pytest.approx(xla["seconds"] / ours["seconds"])
    assert {entry["why"] for entry in record["operations"]} == {
        "there is no kernel for platform cpu"
    }
    assert sum(entry["count"] for entry in record["operations"]) == 4


def test_the_table_ends_at_out_of_memory():
    class Model:
        def __init__(self, label, limit, why="RESOURCE_EXHAUSTED"):
            self.label, self.limit, self.why = label, limit, why

        def builders(self, batch, pass_, repeats, memory):
            def build():
                if batch * (1 + (pass_ == "training")) > self.limit:
                    raise RuntimeError(self.why)
                memory[self.label] = batch
                return lambda: None

            return {self.label: build}

    models = [Model("ours", 4), Model("other", 2), Model("third", 0, "no compiler")]
    table = list(benchmark.rows(models, [1, 2, 4, 8, 16], steps=1))
    ended = {
        (row["batch"], row["pass"], row["who"]): row["failed"]
        for row in table
        if row["who"] != "third" and "failed" in row
    }
    assert set(ended.values()) == {timing.OUT_OF_MEMORY}
    assert sorted(ended) == [
        (2, "training", "other"),
        (4, "inference", "other"),
        (4, "training", "ours"),
        (8, "inference", "ours"),
    ]
    assert max(row["batch"] for row in table) == 8
    assert {row["failed"] for row in table if row["who"] == "third"} == {
        "RuntimeError: no compiler"
    }
    both = [row for row in table if row["who"] == "other" and "seconds" in row]
    assert all(row["ours_is_faster"] > 0 for row in both)
    assert benchmark.show(table[-2]).split() == "8 inference ours out of memory".split()


def test_mfu(monkeypatch):
    row = {"pass": "training", "images_per_second": 4436.0}
    assert benchmark.mfu(row, 14_870_000_000, "bfloat16") is None
    monkeypatch.setattr(chips, "chip", lambda: chips.CHIPS["NVIDIA H200"])
    assert benchmark.mfu(row, 14_870_000_000, "bfloat16") == pytest.approx(0.4, abs=1e-3)
    assert benchmark.mfu(row, 14_870_000_000, "float32") is None


@pytest.mark.parametrize("outputs", [(4, 1000), (5, 4, 1000), "tokens"])
def test_every_model_has_a_loss(outputs):
    if outputs == "tokens":
        outputs = {
            "logits": jnp.ones((4, 1000)),
            "token_logits": jnp.ones((4, 9, 1000)),
            "mixed": jnp.float32(0.5),
        }
    else:
        outputs = jnp.ones(outputs)
    loss = make_loss(Loss())(outputs, jnp.full((4, 1000), 1e-3))
    assert np.isfinite(loss)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model=gcvit_x"], "unknown model 'gcvit_x'. Did you mean gcvit_xt"),
        (["--model=gcvit_xxt", "--image_size=100"], "image_size=100: GC ViT needs a multiple"),
        (["--model=gcvit_xxt", "--batch_sizes=8,x"], "'x': expected a whole number above 0"),
        (["--model=gcvit_xxt", "--save=nowhere/x"], "--save=nowhere/x: there is no folder"),
        (
            ["--model=glnet_4g", "--attention=xla"],
            "glnet_4g has no operation with kernels",
        ),
        (
            ["--model=glnet_4g", "--against=xla"],
            "glnet_4g has no operation with kernels",
        ),
        (
            ["--model=gcvit_xxt", "--against=timm/gcvit_base"],
            "--against=timm/gcvit_base: expected xla, or torch:timm/NAME such as torch:timm/",
        ),
        (["--batch_sizes=8"], "the following arguments are required: --model"),
    ],
)
def test_model_command_refuses(arguments, message, capsys):
    assert _status(benchmark.main, arguments) == 2
    assert message in capsys.readouterr().err


def test_kernels_that_were_asked_for_and_cannot_run_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(window_tpu, "refusal", lambda geometry, every_core: "too large for a core")
    arguments = ["--model=gcvit_xxt", "--implementation=pallas", "--dtype=float32"]
    assert benchmark.main(arguments) == 2
    said = capsys.readouterr().err
    assert (
        "error: --implementation=pallas: no kernel serves 56×56, 2 heads of 32, windows 7×7" in said
    )
    assert "too large for a core. Take auto" in said
