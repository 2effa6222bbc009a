"""What a whole run says of itself: speed, time, checkpoints to keep, and that it hangs."""

import re
import shutil
import subprocess
import sys

import jax
import pytest

from hybrid_flax.costs import chips
from hybrid_flax.run.checkpoints import Checkpoints
from hybrid_flax.run.goodput import account, read_ledger
from hybrid_flax.run.metrics import read_metrics
from tests import toy


def config():
    """Ten steps, two evaluations."""
    return toy.get_config(
        model__dtype="bfloat16",
        checkpoint__keep=1,
        checkpoint__keep_every_steps=4,
        checkpoint__keep_best=1,
        ema_decay=0.0,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(work directory, what was printed) of a run on chips of 1000 FLOP/s each."""
    folder = tmp_path_factory.mktemp("run") / "run"
    said = folder.parent / "said.txt"
    with pytest.MonkeyPatch.context() as patch, open(said, "w") as file:
        patch.setitem(chips.CHIPS, jax.devices()[0].device_kind, chips.Chip(1000.0, 1e12))
        patch.setattr("sys.stdout", file)
        assert toy.train(config(), folder, profile="4:5") == 0
    return folder, said.read_text()


def test_speed_goes_to_the_log_and_the_records(run):
    folder, said = run
    line = r"step 5/10: loss \S+, \d+ images/s, \S+ s/step, .*MFU \d+%, .*\d:\d\d:\d\d left"
    assert re.search(line, said)
    record = [r for r in read_metrics(folder / "metrics.jsonl") if "train/mfu" in r][-1]
    seconds = record["train/seconds_per_step"]
    assert record["train/images_per_second"] == pytest.approx(64 / seconds)
    assert 0 <= record["train/input_wait"] <= 1
    assert record["train/checkpoint_seconds"] >= 0
    assert record["train/mfu"] == pytest.approx(toy.FLOPS / (8 * 1000) / seconds)


def test_the_time_of_a_run_is_accounted_for(run):
    folder, said = run
    lines = read_ledger(folder / "ledger.jsonl")
    found = account(lines)
    assert found.wall == pytest.approx(lines[-1]["elapsed"], abs=0.01)
    assert {kind for kind, seconds in found.seconds.items() if not seconds} <= {
        *("import", "compile", "input wait", "lost steps", "downtime"),  # compiled meanwhile
    }
    (made,) = [line["compiled"] for line in lines if "compiled" in line]
    assert made["source"] in ("new", "the cache")
    assert min(made["trace"], made["lower"], made["compile"]) > 0
    parts = r"import 0.0, start \S+, build \S+, restore \S+, first batch \S+, compile \S+, first st"
    assert re.search(rf"first step done after \S+ s: {parts}", said)
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
        toy.train(config(), folder, profile="5")


def test_a_run_needs_room_for_a_checkpoint(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("hybrid_flax.run.checkpoints.shutil.disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"a checkpoint of this run takes .* \(1,000 bytes\) left"):
        toy.train(config(), tmp_path)


# ------------------------------------------------------------------------------- in other processes

STALLING = """
import sys, time
from hybrid_flax.data import feed
from hybrid_flax.run import record, supervision
from hybrid_flax.run.phases import Phases
from tests import toy

hours = 0

def hang(*_, **__):
    global hours
    hours = 1
    time.sleep(60)

def batches(*args, **kwargs):
    made = original(*args, **kwargs)
    yield next(made)
    yield next(made)
    hang()

phase, workdir = sys.argv[1:]
supervision.Phases = lambda: Phases(lambda: time.monotonic() + 3600 * hours)
if phase == "input wait":
    original, feed.train_batches = feed.train_batches, batches
if phase == "save":
    record.Checkpoints.save = hang
build = toy.disturbed(lambda step: hang() if step and phase == "train" else None)
toy.train(toy.get_config(), workdir, build=build)
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
