"""What a whole run says of itself: speed, time, checkpoints to keep, and that it hangs."""

import re
import shutil
import subprocess
import sys

import jax
import pytest
from flax import nnx

from hybrid_flax.build import build_model
from hybrid_flax.costs import chips
from hybrid_flax.costs.flops import training_flops
from hybrid_flax.run.checkpoints import Checkpoints
from hybrid_flax.run.goodput import account
from hybrid_flax.run.metrics import read_metrics
from hybrid_flax.settings import from_config
from hybrid_flax.train import train
from hybrid_flax.weights import bridge
from tests import tiny


def config():
    """Ten steps, two evaluations."""
    return tiny.get_config(
        model__dtype="bfloat16",
        model__num_classes=10,
        batch_size=64,
        dataset__train_split="train[:320]",
        dataset__val_split="val[:64]",
        checkpoint__keep=1,
        checkpoint__keep_every_steps=4,
        checkpoint__keep_best=1,
        ema_decay=0.0,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(work directory, what was printed) of a run on chips of 1 TFLOP/s each."""
    folder = tmp_path_factory.mktemp("run") / "run"
    said = folder.parent / "said.txt"
    with pytest.MonkeyPatch.context() as patch, open(said, "w") as file:
        patch.setitem(chips.CHIPS, jax.devices()[0].device_kind, chips.Chip(1e12, 1e12))
        patch.setattr("sys.stdout", file)
        assert train(config(), str(folder), profile="4:5") == 0
    return folder, said.read_text()


def test_speed_goes_to_the_log_and_the_records(run):
    folder, said = run
    line = r"step 5/10: loss \S+, \d+ images/s, \S+ s/step, .*MFU \d+%, \d:\d\d:\d\d left"
    assert re.search(line, said)
    record = [r for r in read_metrics(folder / "metrics.jsonl") if "train/mfu" in r][-1]
    seconds = record["train/seconds_per_step"]
    assert record["train/images_per_second"] == pytest.approx(64 / seconds)
    assert 0 <= record["train/input_wait"] <= 1
    assert record["train/checkpoint_seconds"] >= 0
    model = bridge.abstract(lambda: build_model(from_config(config()), rngs=nnx.Rngs(0)))
    least = training_flops(model, image_size=32, batch_size=64) / (8 * 1e12)
    assert record["train/mfu"] == pytest.approx(least / seconds)


def test_the_time_of_a_run_is_accounted_for(run):
    folder, said = run
    lines = read_metrics(folder / "ledger.jsonl")
    found = account(lines)
    assert found.wall == pytest.approx(lines[-1]["elapsed"], abs=0.01)
    assert {kind for kind, seconds in found.seconds.items() if not seconds} <= {
        *("input wait", "lost steps", "downtime"),
    }
    goodputs = [r["run/goodput"] for r in read_metrics(folder / "metrics.jsonl") if "val/top1" in r]
    assert len(goodputs) == 2
    assert 0 < goodputs[0] < 1
    assert f"  {found}\n" == said.splitlines(keepends=True)[-1]


def test_milestones_and_the_best_are_kept(run):
    folder, _ = run
    records = read_metrics(folder / "metrics.jsonl")
    best = max((r["val/top1"], -r["step"]) for r in records if "val/top1" in r)
    assert Checkpoints(folder / "checkpoints").steps() == sorted({4, 8, 10, -best[1]})


def test_the_steps_asked_for_are_recorded(run):
    folder, said = run
    assert len(list((folder / "profile").rglob("*.xplane.pb"))) == 1
    assert f"recorded steps 4 to 5 in {folder}/profile" in said
    with pytest.raises(ValueError, match="--profile=5: expected the first and the last step"):
        train(config(), str(folder), profile="5")


def test_a_run_needs_room_for_a_checkpoint(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("hybrid_flax.run.checkpoints.shutil.disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"a checkpoint of this run takes .* \(1,000 bytes\) left"):
        train(config(), str(tmp_path))


# ------------------------------------------------------------------------------- in other processes

STALLING = """
import sys, time
import jax.numpy as jnp
from hybrid_flax import program, train
from hybrid_flax.run.goodput import Phases
from tests import tiny

hours = 0

def hang(*_, **__):
    global hours
    hours = 1
    time.sleep(60)

def step(self, state, batch):  # without compiling
    if state["step"] and sys.argv[1] == "train":
        hang()
    number = jnp.float32(1)
    metrics = {"loss": number, "grad_norm": number, "learning_rate": number}
    return state | {"step": state["step"] + 1}, metrics | {"non_finite": jnp.int32(-1)}

def batches(*args, **kwargs):
    made = original(*args, **kwargs)
    yield next(made)
    yield next(made)
    hang()

program.CompiledOnce.__call__ = step
train.Phases = lambda: Phases(lambda: time.monotonic() + 3600 * hours)
if sys.argv[1] == "input wait":
    original, train.train_batches = train.train_batches, batches
if sys.argv[1] == "save":
    train.Checkpoints.save = hang
train.train(tiny.get_config(dataset__num_workers=0), sys.argv[2])
"""


@pytest.mark.parametrize("phase", ["input wait", "train", "save"])
def test_a_run_that_hangs_says_where_and_ends_with_124(tmp_path, phase):
    result = subprocess.run(
        [sys.executable, "-c", STALLING, phase, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 124, result.stderr
    for text in (result.stderr, (tmp_path / "stall-0.txt").read_text()):
        assert f"has been in phase '{phase}' for 36" in text
        assert " in hang\n" in text
