"""The processes that prepare batches: their deaths, their memory, what they leave behind."""

import multiprocessing.util
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from hybrid_flax.data import workers
from hybrid_flax.data.loader import eval_batches, train_batches
from hybrid_flax.data.transforms import EvalTransform
from hybrid_flax.errors import InputError, TrainingError
from tests.data.test_loader import Coloured, assert_equal, take, transform


def test_a_worker_that_dies_while_it_starts_is_an_error(monkeypatch):
    """Though it was to be told more than a pipe holds."""
    spawn = multiprocessing.util.spawnv_passfds

    def spawn_and_kill(path, command, *rest):
        process = spawn(path, command, *rest)
        if any("spawn_main" in str(part) for part in command):
            os.kill(process, signal.SIGKILL)
        return process

    source = Coloured(50, bad=tuple(range(50, 100_000)))
    batches = train_batches(transform(source), batch_size=5, seed=0, num_workers=1)
    monkeypatch.setattr(multiprocessing.util, "spawnv_passfds", spawn_and_kill)
    with pytest.raises(RuntimeError, match="terminated unexpectedly with exit code -9"):
        next(batches)


def test_a_worker_that_runs_out_of_memory_is_one_clear_error():
    class Deadly(Coloured):
        def __getitem__(self, index):
            os.kill(os.getpid(), signal.SIGBUS)

    batches = train_batches(transform(Deadly(9)), batch_size=3, seed=0, num_workers=1)
    with pytest.raises(TrainingError, match=r"exit code -7 \(bus error: no shared") as caught:
        next(batches)
    batches.close()
    killed = workers._why_it_died(-9, "8 processes prepare")
    assert "exit code -9 (killed, as when memory runs out). 8 processes" in killed
    for said in (killed, str(caught.value)):
        for part in ("/dev/shm", "--shm-size", "--config.dataset.num_workers", "MB free"):
            assert part in said
    crashed = workers._why_it_died(-11, "")
    assert "num_workers=0 prepares them in this process" in crashed


def test_little_shared_memory_makes_batches_come_through_pipes(monkeypatch, caplog):
    source, options = transform(Coloured(23)), {"batch_size": 6, "seed": 3}
    whole = take(train_batches(source, **options), 4)
    monkeypatch.setattr(workers, "_free_shared", lambda: 4096)
    batches = train_batches(source, **options, num_workers=1)
    got = take(batches, 4)
    batches.close()
    assert_equal(got, whole)
    assert all(type(value) is np.ndarray for value in got[0].values())
    assert "/dev/shm has 0 MB free, and 1 processes may need 0 MB of it" in caplog.text
    assert "--shm-size" in caplog.text


def test_batches_that_no_machine_holds_are_refused():
    source = EvalTransform(Coloured(13), 100_000, 0.875, "center", "bicubic", False)
    with pytest.raises(InputError, match=r"batches of .* MB, .* this machine has .*batch_size"):
        next(eval_batches(source, batch_size=1_000_000))


def test_shared_memory_of_batches_has_no_name_once_they_are_there():
    batches = train_batches(transform(Coloured(50)), batch_size=5, seed=0, num_workers=1)
    batch = next(batches)
    assert not os.path.exists(f"/dev/shm/{batch['image'].shm.name}")
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["index"])
    batches.close()
    assert list(batches) == []


_TRAINER = """
import sys
from tests.data.test_loader import Coloured, transform
from hybrid_flax.data.loader import train_batches

if __name__ == "__main__":
    batches = train_batches(transform(Coloured(50)), batch_size=5, seed=0, num_workers=2)
    next(batches)
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_no_worker_outlives_a_killed_trainer(tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(_TRAINER)
    with subprocess.Popen(
        [sys.executable, str(script)],
        env=os.environ | {"PYTHONPATH": os.getcwd()},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    ) as trainer:
        assert trainer.stdout.readline() == "ready\n"
        group = os.getpgid(trainer.pid)
        trainer.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while _alive(group) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _alive(group)


def _alive(group: int) -> bool:
    """Whether the process group has a process that is not only waiting to be reaped."""
    table = subprocess.run(["ps", "-A", "-o", "pgid=,stat="], capture_output=True, text=True)
    rows = (line.split() for line in table.stdout.splitlines())
    return any(int(pgid) == group and not stat.startswith("Z") for pgid, stat in rows)
