import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

import hybrid_flax.build
from hybrid_flax.data import feed
from hybrid_flax.data.sources import source_of
from hybrid_flax.data.sources.part import part_of
from hybrid_flax.run.checkpoints import Checkpoints
from hybrid_flax.run.goodput import account, read_ledger
from hybrid_flax.run.metrics import read_metrics
from hybrid_flax.settings import from_config
from hybrid_flax.train import train
from tests import tiny, toy
from tests.end_to_end.same_bits import assert_same_bits, final_arrays


def learning(workdir):
    """What was measured at each step, without the speeds."""
    speeds = "images_per_second", "seconds_per_step", "input_wait", "checkpoint_seconds"
    other = {"run/goodput", *(f"train/{name}" for name in speeds)}
    records = read_metrics(os.path.join(workdir, "metrics.jsonl"))
    return [{k: v for k, v in record.items() if k not in other} for record in records]


# ----------------------------------------------------------- in this process, on 8 virtual devices


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The work directory of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("run") / "whole"
    assert toy.train(toy.get_config(), workdir) == 0
    return workdir


def test_a_run_leaves_all_its_records(finished):
    names = {path.name for path in finished.iterdir()}
    assert names > {"checkpoints", "config.json", "versions.json", "metrics.jsonl", "curves.png"}
    assert any(name.startswith("events.out.tfevents") for name in names)
    config = json.loads((finished / "config.json").read_text())
    assert config["model"]["num_classes"] == 10  # as resolved from the dataset
    assert config["optimizer"]["learning_rate"] == 2e-3
    versions = json.loads((finished / "versions.json").read_text())
    assert versions["jax"] == jax.__version__
    assert versions["devices"] == "8 x cpu"
    with Image.open(finished / "curves.png") as curves:
        assert curves.width > 800
    assert Checkpoints(finished / "checkpoints").steps() == [6, 9, 10]
    records = read_metrics(finished / "metrics.jsonl")
    assert [r["step"] for r in records if "val/top1" in r] == [5, 10]
    assert [r["step"] for r in records if "train/loss" in r] == [2, 3, 4, 5, 6, 8, 9, 10]
    assert records[-1]["val/images"] == records[-1]["val_ema/images"] == 64


def test_running_a_finished_run_shows_its_result(finished, capsys):
    files = finished / "metrics.jsonl", finished / "ledger.jsonl"
    before = [file.read_text() for file in files]
    assert toy.train(toy.get_config(), finished) == 0
    said = capsys.readouterr().out
    assert "finished: 10 steps of unified_convnext_micro" in said
    assert "averaged weights: top-1" in said
    assert [file.read_text() for file in files] == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_saves_and_the_same_command_continues(finished, tmp_path, capsys, number):
    assert toy.train(toy.get_config(), tmp_path, build=toy.stopping(number, after=7)) == (
        128 + number
    )
    assert Checkpoints(tmp_path / "checkpoints").steps()[-1] == 8
    assert f"stopped by {number.name}; step 8 is saved" in capsys.readouterr().out
    assert toy.train(toy.get_config(), tmp_path) == 0
    assert "continuing from the checkpoint of step 8" in capsys.readouterr().out
    assert_same_bits(final_arrays(tmp_path), final_arrays(finished))


def test_what_moves_to_the_devices_unasked_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(feed, "to_devices", lambda batch, mesh: batch)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed host-to-device transfer"):
        toy.train(toy.get_config(), tmp_path)


def test_a_damaged_checkpoint_costs_steps_but_changes_nothing(finished, tmp_path, caplog):
    make = toy.get_config()
    assert toy.train(make, tmp_path) == 0
    newest = tmp_path / "checkpoints" / "10"
    for data in (newest / "state").rglob("d/*"):
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    assert toy.train(make, tmp_path) == 0
    assert f"checkpoint {newest} is damaged and will not be used" in caplog.text
    assert "going back to the intact checkpoint of step 9" in caplog.text
    assert (tmp_path / "damaged" / "10").is_dir()
    assert_same_bits(final_arrays(tmp_path), final_arrays(finished))
    assert learning(tmp_path) == learning(finished)


def test_the_checkpoint_cadence_changes_nothing(finished, tmp_path):
    config = toy.get_config(checkpoint__every_steps=10, log_every_steps=5, eval__batch_size=33)
    assert toy.train(config, tmp_path) == 0
    assert_same_bits(final_arrays(tmp_path), final_arrays(finished))
    got, want = learning(tmp_path)[-1], learning(finished)[-1]
    assert got.keys() == want.keys()
    assert got["val/top1"] == want["val/top1"]
    assert got["val/loss"] == pytest.approx(want["val/loss"], rel=1e-6)


# --------------------------------------------------------------------------- killed for real, twice


@pytest.fixture(scope="module")
def subprocess_cache(tmp_path_factory):
    return str(tmp_path_factory.mktemp("subprocess-jax-cache"))


def run_tiny(cache, *arguments):
    environment = os.environ | {  # one device, as on a laptop
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }
    return subprocess.run(
        [sys.executable, "-m", "tests.tiny", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def order(file):
    """{step: images}, the last time a batch of that step was made."""
    return {line.split()[0]: line.split()[1:] for line in file.read_text().splitlines()}


def test_a_killed_run_ends_as_if_nothing_had_happened(tmp_path, subprocess_cache):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = run_tiny(subprocess_cache, whole, f"--order={tmp_path}/whole.txt")
    assert result.returncode == 0, result.stderr
    for moment in (
        ["--kill-in=save"],  # while the first checkpoint is being written
        ["--kill-in=evaluate"],
    ):
        result = run_tiny(subprocess_cache, killed, *moment, f"--order={tmp_path}/killed.txt")
        assert result.returncode == -signal.SIGKILL, result.stderr
    result = run_tiny(subprocess_cache, killed, f"--order={tmp_path}/killed.txt")
    assert result.returncode == 0, result.stderr
    assert_same_bits(final_arrays(killed), final_arrays(whole))
    assert learning(killed)[-1] == learning(whole)[-1]
    seen, want = order(tmp_path / "killed.txt"), order(tmp_path / "whole.txt")
    assert {step: seen[step] for step in want} == want
    lines = read_ledger(killed / "ledger.jsonl")
    found = account(lines)
    life = lines[-1]["time"] - lines[0]["time"] + lines[0]["elapsed"]
    assert found.starts == 3
    assert found.wall == pytest.approx(life, abs=0.1)
    assert found.seconds["lost steps"] > 0


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"model__name": "gcvit_q"},
            "unknown model 'gcvit_q'. Did you mean gcvit_",
        ),
        (
            {"model__name": "gcvit_xxt", "model__overrides": {}, "model__image_size": 100},
            "image_size=100: GC ViT needs a multiple of 32",
        ),
        (
            {"model__dtype": "float16"},
            "model.dtype='float16': expected one of 'bfloat16', 'float32'",
        ),
        (
            {"model__implementation": "triton"},
            "model.implementation='triton': expected one of 'auto', 'pallas', 'xla'",
        ),
        ({"optimizer__name": "adam"}, "optimizer.name='adam': expected one of 'adamw', 'lamb', 's"),
        (
            {"optimizer__decay_also": ("(",)},
            "decay_also=('(',): expected a tuple of regular expressions",
        ),
        ({"batch_size": 100}, "batch_size=100 cannot be split evenly over 8 devices"),
        ({"batch_size": 4000}, "batch_size=4000, but there are only 1437 training images"),
        ({"model__num_classes": 3}, "num_classes=3, but dataset digits has 10 classes"),
        ({"augment__auto_augment": "rand-m99"}, "'rand-m99': m must be 0 to 10"),
        ({"augment__auto_augment": "autoaugment"}, "augment.auto_augment='autoaugment': exp"),
        ({"augment__colour_jitter": (0.4, 0.4, 0.4, 0.6)}, "saturation, hue) from 0, the last up"),
        ({"augment__colour_jitter": (0.4,)}, "colour_jitter=(0.4,): expected strengths"),
        ({"augment__repeats": 0}, "augment.repeats=0: expected a whole number from 1"),
        (
            {"augment__mix_group": 96},
            "augment.mix_group=96: 256 images (--config.batch_size=256, "
            "--config.accumulation_steps=1) are not a multiple of it; use 0 for one group of all, "
            "or for example 64",
        ),
        (
            {"model__batch_norm_group": 100, "accumulation_steps": 2},
            "model.batch_norm_group=100: 128 images",
        ),
        (
            {"model__name": "gcvit_xxt", "model__overrides": {}, "model__batch_norm_group": 64},
            "model.batch_norm_group=64, but gcvit_xxt has no batch norms; use 0",
        ),
        ({"augment__crop_scale": (0.5, 2.0)}, "crop_scale=(0.5, 2.0): expected (low, high)"),
        ({"dataset__name": "image_folder"}, "--config.dataset.path=DIR"),
        ({"schedule__decay_epochs": 0.5}, "decay_epochs=0.5 ends before the warm-up"),
        ({"init_from": "/nowhere"}, "there is no checkpoint in /nowhere/checkpoints"),
    ],
)
def test_unusable_settings_are_named(tmp_path, overrides, message):
    with pytest.raises(ValueError) as error:
        train(tiny.get_config(**overrides), str(tmp_path / "run"))
    assert message in str(error.value)


def test_several_bad_settings_are_named_at_once(tmp_path):
    with pytest.raises(ValueError) as error:
        train(tiny.get_config(epochs=0, ema_decay=1.5, eval__crop_mode="middle"), str(tmp_path))
    for name in ("epochs=0", "ema_decay=1.5", "eval.crop_mode='middle'"):
        assert f"--config.{name}" in str(error.value)


def test_the_work_directory_of_another_run_is_refused(finished):
    before = (finished / "config.json").read_text()
    with pytest.raises(ValueError, match="holds another run") as error:
        toy.train(toy.get_config(seed=43, optimizer__learning_rate=1.0), finished)
    assert "seed: the run has 42, you gave 43" in str(error.value)
    assert "optimizer.learning_rate: the run has 0.002, you gave 1.0" in str(error.value)
    assert (finished / "config.json").read_text() == before


def test_a_dataset_that_shrank_since_the_checkpoint_is_refused(finished, monkeypatch):
    def shrunk(dataset, split, classes=None):
        return part_of(source_of(dataset, split), ":300", split)

    monkeypatch.setattr(hybrid_flax.build, "source_of", shrunk)
    before = Checkpoints(finished / "checkpoints").steps()
    with pytest.raises(
        ValueError,
        match=r"changed since the checkpoint of step 10 \(training images: 320 then, 300 now",
    ):
        toy.train(toy.get_config(), finished)
    assert Checkpoints(finished / "checkpoints").steps() == before


def test_two_processes_cannot_share_a_work_directory(finished):
    from hybrid_flax.run.workdir import Workdir

    config = from_config(toy.get_config(model__num_classes=10))
    with (
        Workdir(str(finished), config),
        pytest.raises(
            ValueError, match=rf"another process \(process {os.getpid()} on .*\) is training in"
        ),
    ):
        toy.train(toy.get_config(), finished)


def test_a_work_directory_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ValueError, match="cannot write to the work directory .*Not a directory"):
        toy.train(toy.get_config(), str(tmp_path / "file" / "run"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_work_directory_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="cannot write to the work directory .*Permission denied"):
        toy.train(toy.get_config(), tmp_path)
    tmp_path.chmod(0o700)


# ------------------------------------------------------------------- image folders and fine-tuning


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """12 training and 5 validation images of three classes, one of each split unreadable."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for number, name in enumerate(("cat", "dog", "eel")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 80, (40, 50, 3), dtype=np.uint8) + np.uint8(80 * number)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.JPEG")
    (folder / "train" / "dog" / "2.JPEG").write_bytes(b"\xff\xd8 cut off")
    (folder / "val" / "eel" / "1.JPEG").write_text("not an image")
    return folder


def photo_config(photos, **overrides):
    return toy.get_config(
        dataset__name="image_folder",
        dataset__path=str(photos),
        model__num_classes=0,
        dataset__train_split="train",
        dataset__val_split="val",
        **{"batch_size": 8, "epochs": 1, **overrides},
    )


def test_an_unreadable_image_is_fatal_by_default(photos, tmp_path):
    with pytest.raises(ValueError, match=r"cannot read image .*/train/dog/2.JPEG \(10 bytes\)"):
        toy.train(photo_config(photos), tmp_path)


def test_an_unreadable_image_is_skipped_named_and_counted_if_asked(photos, tmp_path, caplog):
    assert toy.train(photo_config(photos, dataset__on_unreadable="skip"), tmp_path) == 0
    assert "train/dog/2.JPEG" in caplog.text
    assert "val/eel/1.JPEG" in caplog.text
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert records[-1]["val/images"] == 5
    assert max(record.get("train/unreadable_images", 0) for record in records) >= 1


def test_fine_tuning_with_other_classes(finished, photos, tmp_path, capsys):
    config = photo_config(photos, dataset__on_unreadable="skip", init_from=str(finished))
    assert toy.train(config, tmp_path) == 0
    said = capsys.readouterr().out
    assert (
        f"starting from the averaged weights of {finished} (unified_convnext_micro, step 10)"
        in said
    )
    assert "the classifier for 10 classes is replaced by a fresh one for 3" in said
    assert final_arrays(tmp_path).arrays["params/head/kernel"].shape == (192, 3)


def test_training_from_a_converted_folder_needs_another_work_directory(tmp_path):
    converted = Checkpoints(tmp_path / "checkpoints")
    converted.save(0, {"params": {"a": np.zeros(3)}}, {"model": "x"})
    converted.wait()
    with pytest.raises(ValueError, match=f"no training run.*--config.init_from={tmp_path}"):
        toy.train(toy.get_config(), tmp_path)
