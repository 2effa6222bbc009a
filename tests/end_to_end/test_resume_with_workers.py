"""A run with data-loading processes that dies twice ends as one that never did, without them."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from hybrid_flax.run.checkpoints import Checkpoints
from tests.chaos import data_workers
from tests.end_to_end.same_bits import assert_same_bits, final_arrays

# 44 steps: many more than the workers can have read ahead when the first checkpoint is there.
CONFIG = """
from tests import toy

def get_config():
    return toy.get_config(batch_size=64, eval__every_epochs=2, dataset__train_split="train")
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """start(workdir, num_workers) → the training program as a process."""
    folder = tmp_path_factory.mktemp("programs")
    (folder / "config.py").write_text(CONFIG)
    environment = os.environ | {
        "PYTHONPATH": os.getcwd(),
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }

    programs = []

    def start(workdir: pathlib.Path, num_workers: int) -> subprocess.Popen:
        program = subprocess.Popen(
            [
                *(sys.executable, "-m", "tests.toy", f"--workdir={workdir}"),
                *(f"--config={folder}/config.py", f"--config.dataset.num_workers={num_workers}"),
            ],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        programs.append(program)
        return program

    yield start
    for program in programs:
        program.kill()
        program.wait()
        program.stderr.close()


def end(program: subprocess.Popen, seconds: float) -> tuple[int, str]:
    """(exit status, what it wrote to stderr); an error if it is not over by then."""
    said = program.communicate(timeout=seconds)[1]
    return program.returncode, said


def saved_steps(workdir: pathlib.Path) -> list[int]:
    return Checkpoints(workdir / "checkpoints").steps()


def wait_for_a_checkpoint(program: subprocess.Popen, workdir: pathlib.Path):
    """Until there is one of a later step than now."""
    before = saved_steps(workdir)[-1:]
    while saved_steps(workdir)[-1:] == before:
        assert program.poll() is None, program.stderr.read()
        time.sleep(0.02)


@pytest.mark.slow
def test_deaths_of_a_worker_and_of_the_trainer_change_nothing(start, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    status, said = end(start(whole, 0), 600)
    assert status == 0, said

    program = start(killed, 2)
    wait_for_a_checkpoint(program, killed)
    workers = data_workers(program.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    status, said = end(program, 60)  # a few seconds, and not never
    assert status == 1
    assert "Worker process was terminated unexpectedly with exit code -9" in said

    program = start(killed, 2)
    wait_for_a_checkpoint(program, killed)
    program.kill()
    assert end(program, 60)[0] == -signal.SIGKILL
    assert saved_steps(killed)[-1] < 44

    status, said = end(start(killed, 2), 600)
    assert status == 0, said
    assert saved_steps(killed)[-1] == 44
    assert_same_bits(final_arrays(killed), final_arrays(whole))
