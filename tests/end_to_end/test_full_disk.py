"""A disk that is full, a work directory that is gone, a pipe that is closed, while a run trains."""

import errno
import os
import shutil
import subprocess
import sys

import pytest

from hybrid_flax.errors import TrainingError
from hybrid_flax.run import files
from hybrid_flax.run.checkpoints import Checkpoints
from tests import toy


@pytest.mark.parametrize(
    "name",
    [
        "metrics.jsonl",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("events", "ledger.jsonl")),
        "curves.png",
    ],
)
def test_a_record_that_cannot_be_written_ends_with_step_and_checkpoint(tmp_path, monkeypatch, name):
    full = False

    def fill(step):
        nonlocal full
        full = step == 4  # the checkpoint of step 3 is there

    write = files._write

    def refuse(descriptor, data):
        if full_for(descriptor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(descriptor, data)

    def full_for(descriptor):
        file = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
        return full and file.startswith(name)

    monkeypatch.setattr(files, "_write", refuse)
    with pytest.raises(TrainingError) as error:
        toy.train(toy.get_config(log_every_steps=1), tmp_path, build=toy.disturbed(fill))
    said = str(error.value)
    assert "training stopped at step 5: " in said
    assert f"{tmp_path}/{name}" in said
    assert ": No space left on device. Last checkpoint: " in said
    assert f"{tmp_path}/checkpoints/3. Make room on the disk; the same command continues" in said
    if name == "metrics.jsonl":
        full = False
        assert toy.train(toy.get_config(log_every_steps=1), tmp_path) == 0


@pytest.mark.parametrize("instead", [None, "an empty one"])
def test_a_work_directory_that_was_moved_is_not_made_anew(tmp_path, instead):
    def move(step):
        if step == 5:
            shutil.move(tmp_path / "run", tmp_path / "moved")
            if instead:
                (tmp_path / "run").mkdir()

    with pytest.raises(TrainingError, match=r"stopped at step \d: .*work directory was moved"):
        toy.train(toy.get_config(), tmp_path / "run", build=toy.disturbed(move))
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert Checkpoints(tmp_path / "moved" / "checkpoints").steps() == [3]


def test_an_error_while_closing_does_not_hide_the_first(tmp_path, monkeypatch, caplog):
    from hybrid_flax.data.feed import Feed

    def fail(*_):
        raise ValueError("closing failed, too")

    def lose(step):
        if step == 4:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "/data/a.jpg")

    monkeypatch.setattr(Feed, "close", fail)
    with pytest.raises(TrainingError, match="at step 4: /data/a.jpg: Input/output error. Last che"):
        toy.train(toy.get_config(), tmp_path, build=toy.disturbed(lose))
    assert "closing failed, too" in caplog.text


@pytest.mark.slow
def test_a_run_that_nobody_listens_to_is_saved_and_says_so(tmp_path):
    command = [sys.executable, "-m", "tests.toy", "--config=tests/toy.py", f"--workdir={tmp_path}"]
    with subprocess.Popen(
        [*command, "--config.epochs=2000", "--config.log_every_steps=1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        while "step 2/" not in process.stdout.readline():
            pass
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait() == 1
    (said,) = (line for line in errors.splitlines() if "error: " in line)
    assert "Traceback" not in errors
    newest = Checkpoints(tmp_path / "checkpoints").steps()[-1]
    assert said.startswith("error: nobody reads what training says")
    assert f"stopped at step {newest}, which is saved; the same command continues" in said
