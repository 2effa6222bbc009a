"""Two processes train together, and one of them is killed again and again.

python -m tests.soak [--kills=10] [--seed=0] [--folder=DIR]       (make soak)

Each time the other has to stop by itself, with a message, within the time after which a silent
process counts as gone. Both are started again. At the end the last checkpoint is compared bit by
bit with that of two processes that nobody disturbed.
"""

import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

from tests.chaos import Failure, Watched, parse, verdict, wait_for

PEER_TIMEOUT = 20  # seconds; the default, 60, would make the soak longer and show no more
SLACK = 20  # seconds that a survivor may take besides, on a busy machine
STEPS = 44  # in two processes of half the batch, one epoch of tests/chaos.py


class Pair:
    """One start of both processes."""

    def __init__(self, workdir: pathlib.Path, compiled: pathlib.Path):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(compiled),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
        }
        workdir.parent.mkdir(parents=True, exist_ok=True)
        self.logs = [workdir.with_suffix(f".{i}.log") for i in range(2)]
        self.processes = []
        for i, log in enumerate(self.logs):
            command = [sys.executable, "-m", "hybrid_flax.main", "--config=tests/chaos.py"]
            command += ["--config.epochs=1", f"--workdir={workdir}"]
            command += [f"--coordinator=127.0.0.1:{port}", "--num_processes=2", f"--process_id={i}"]
            command += [f"--peer_timeout={PEER_TIMEOUT}"]
            with open(log, "w") as stream:
                self.processes.append(
                    subprocess.Popen(command, env=environment, stdout=stream, stderr=stream)
                )

    def statuses(self) -> list[int | None]:
        """Of both; None while one runs."""
        return [process.poll() for process in self.processes]

    def wait(self) -> None:
        """Until both are finished; Failure if one is not."""
        wait_for(lambda: None not in self.statuses(), "the end of both", self.logs[0])
        if self.statuses() != [0, 0]:
            raise Failure(f"undisturbed, they ended with {self.statuses()}; see {self.logs}")

    def end(self) -> None:
        """Leaves nothing running."""
        for process in self.processes:
            process.kill()
            process.wait()


def kill_one(pair: Pair, run: Watched, victim: int, step: int, delay: float) -> str:
    """Kills it after that step; the other must end in time. A line about what happened."""

    def due():
        if any(status is not None for status in pair.statuses()):
            raise Failure(f"ended by themselves with {pair.statuses()}; see {pair.logs}")
        return run.step() >= step and "\nstep " in pair.logs[0].read_text()  # this start's

    wait_for(due, f"step {step}", pair.logs[0])
    time.sleep(delay)
    reached = run.step()
    pair.processes[victim].send_signal(signal.SIGKILL)
    killed, survivor = time.monotonic(), 1 - victim
    wait_for(lambda: pair.processes[survivor].poll() is not None, "the other", pair.logs[survivor])
    took, status = time.monotonic() - killed, pair.processes[survivor].returncode
    last_words = pair.logs[survivor].read_text().strip().splitlines()[-1:]
    if status == 0 or not last_words:
        raise Failure(f"the survivor ended with status {status}; see {pair.logs[survivor]}")
    if took > PEER_TIMEOUT + SLACK:
        raise Failure(f"the survivor ended only after {took:.0f} s; see {pair.logs[survivor]}")
    return (
        f"process {victim} killed at step {reached}; the other ended after {took:.1f} s with "
        f"status {status}: {last_words[0][:120]}"
    )


def main() -> int:
    options = parse("kills", 10)
    folder = options.folder
    rng, began = random.Random(options.seed), time.monotonic()
    compiled, run = folder / "compiled", Watched(folder / "disturbed")
    print(f"seed {options.seed}, {STEPS} steps, in {folder}", flush=True)
    pair = Pair(folder / "undisturbed", compiled)
    try:
        pair.wait()
        for i in range(options.kills):
            step = int((i + rng.random()) * (STEPS - 5) / options.kills)
            pair = Pair(run.path, compiled)
            said = kill_one(pair, run, rng.randrange(2), step, rng.uniform(0, 0.5))
            print(f"{i + 1:4d}  {said}", flush=True)
            pair.end()
        pair = Pair(run.path, compiled)
        pair.wait()
    except Failure as failure:
        print(f"FAILED, seed {options.seed}: {failure}")
        return 1
    finally:
        pair.end()
    print(f"{options.kills} kills, {time.monotonic() - began:.0f} s")
    return verdict(options, run.path)


if __name__ == "__main__":
    sys.exit(main())
