"""Trains a tiny model while disturbing it at random; it must end as if nothing had happened.

python -m tests.chaos [--faults=300] [--seed=0] [--folder=DIR]       (make chaos)

The program is `python -m hybrid_flax.main` as anyone starts it, seen only from outside: from its
exit status, its log and its work directory. Some faults damage the newest checkpoint, or a compiled
program that the next start would load, between two starts; the others stop the process. Most strike
at a step that was drawn beforehand, a few while it starts. Then the run is left alone to its end,
and its last checkpoint, with weights, averages and optimizer, is compared bit by bit with that of
an undisturbed run.

To start hundreds of times in reasonable time, each start is a fork of this process, which has
imported everything but has not touched JAX's devices. The forks are processes like any other, and
kills are real. Disk full is the one simulation: from a random moment on, the kernel refuses any
write past a random size (RLIMIT_FSIZE), as it would refuse it on a full disk, with another errno.
"""

import os

if __name__ == "__main__":  # before JAX and NumPy are imported
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # one device, compiled quickly
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # threads are not forked

import argparse
import collections
import dataclasses
import importlib
import json
import pathlib
import random
import re
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import time

import ml_collections

from hybrid_flax.run.checkpoints import Checkpoints
from tests import tiny

STOPS = ("kill", "kill in save", "sigterm", "sigterm twice", "kill a data worker", "disk full")
PROGRAM = "damage a compiled program"
DAMAGES = ("flip a bit", "truncate a file", "delete a file", PROGRAM)
STEPS_PER_FAULT = 4
STEPS_PER_EPOCH = 1437 // 32
PATIENCE = 300  # seconds for anything, on a busy machine; a stop takes far less


def get_config() -> ml_collections.ConfigDict:
    """More steps of the tiny recipe; `--config=tests/chaos.py` finds it here."""
    return tiny.get_config(batch_size=32, log_every_steps=1, eval__every_epochs=4)


class Failure(Exception):
    """The run did something that it promises not to do."""


@dataclasses.dataclass(frozen=True)
class Fault:
    stop: str  # one of STOPS
    damage: str | None  # one of DAMAGES, done after the stop: to the newest checkpoint, or PROGRAM
    step: int | None  # not before this step is logged; None: while the program starts
    delay: float  # seconds from that moment on


def plan(faults: int, steps: int, seed: int) -> list[Fault]:
    """Stops spread evenly over the steps, kinds in equal shares, order and moments at random."""
    rng = random.Random(seed)
    share = faults * len(DAMAGES) // (len(STOPS) + len(DAMAGES))
    damages = [DAMAGES[i % len(DAMAGES)] for i in range(share)]
    stops = [STOPS[i % len(STOPS)] for i in range(faults - len(damages))]
    afterwards = damages + [None] * (len(stops) - len(damages))
    rng.shuffle(stops)
    rng.shuffle(afterwards)
    planned = []
    for i, (stop, damage) in enumerate(zip(stops, afterwards, strict=True)):
        if stop in ("kill", "sigterm") and rng.random() < 0.2:
            planned.append(Fault(stop, damage, None, rng.uniform(0, 4)))
        else:
            step = int((i + rng.random()) * steps / len(stops))
            delay = rng.uniform(0, 0.03 if stop == "kill in save" else 0.1)
            planned.append(Fault(stop, damage, step, delay))
    return planned


class Watched:
    """A work directory as its owner sees it, while a program trains in it."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.checkpoints = path / "checkpoints"

    def step(self) -> int:
        """The last step that was logged."""
        try:
            with open(self.path / "metrics.jsonl", "rb") as file:
                file.seek(-min(4096, file.seek(0, os.SEEK_END)), os.SEEK_END)
                lines = file.read().split(b"\n")
            return json.loads(lines[-2])["step"]
        except (OSError, IndexError, ValueError):  # not there yet, or being written
            return 0

    def unfinished(self) -> set[int]:
        """I-nodes of checkpoints that are being written, or were when the program was killed."""
        return {node for step, node in self._folders() if step is None}

    def saved(self) -> list[tuple[int, int]]:
        """(step, i-node) of each finished checkpoint, ascending."""
        return sorted((step, node) for step, node in self._folders() if step is not None)

    def _folders(self) -> list[tuple[int | None, int]]:
        try:
            with os.scandir(self.checkpoints) as entries:
                return [(int(e.name) if e.name.isdigit() else None, e.inode()) for e in entries]
        except FileNotFoundError:
            return []


def start(arguments: list[str], log: pathlib.Path) -> int:
    """`python -m hybrid_flax.main ARGUMENTS` in a fork of this process; its process id."""
    sys.stdout.flush()
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | os.O_APPEND)
    process = os.fork()
    if process:
        os.close(output)
        return process
    status = 70
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = ["hybrid_flax.main", *arguments]
        runpy.run_module("hybrid_flax.main", run_name="__main__")
    except SystemExit as error:
        status = error.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(process: int) -> int | None:
    """Exit status, negative after a signal; None while it runs."""
    found, status = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def wait_for(condition, what: str, log: pathlib.Path):
    """The first true value of `condition()`, asked every few milliseconds."""
    give_up = time.monotonic() + PATIENCE
    while not (value := condition()):
        if time.monotonic() > give_up:
            raise Failure(f"waited {PATIENCE} s for {what}; see {log}")
        time.sleep(0.002)
    return value


def data_workers(process: int) -> list[int]:
    """Processes that read images for this one."""
    try:  # children belong to the thread that started them
        files = pathlib.Path(f"/proc/{process}/task").glob("*/children")
        lists = [file.read_text() for file in files]
    except OSError:  # a thread or the process has just ended
        return []
    children = [int(number) for number in " ".join(lists).split()]
    return [child for child in children if b"spawn_main" in _command_line(child)]


def _command_line(process: int) -> bytes:
    try:
        return pathlib.Path(f"/proc/{process}/cmdline").read_bytes()
    except FileNotFoundError:
        return b""


class Chaos:
    """One disturbed run."""

    def __init__(self, folder: pathlib.Path, arguments: list[str], seed: int):
        self.run = Watched(folder / "disturbed")
        self.arguments = [*arguments, f"--workdir={self.run.path}"]
        self.log = folder / "log.txt"
        self.rng = random.Random(f"{seed} bits")
        self.damaged: set[tuple[int, int]] = set()
        self.reached = 0  # the furthest step seen since the last restored checkpoint
        self.lost: list[int] = []  # steps done again, for each start that found a checkpoint
        self.noticed = 0  # damaged checkpoints that a start refused
        self.compiled_anew = 0  # damaged programs that a start refused
        self.programs = folder / "compiled"

    def disturb(self, fault: Fault) -> str:
        """Starts the program, stops it, damages its checkpoint; a line about what happened."""
        began, workers, left_behind = time.monotonic(), [], self.run.unfinished()
        arguments = self.arguments
        if fault.stop == "kill a data worker":
            arguments = [*arguments, "--config.dataset.num_workers=1"]
        process = start(arguments, self.log)

        def due():
            if (status := ended(process)) is not None:
                raise Failure(
                    f"it ended by itself with status {status} before {fault}; see {self.log}"
                )
            if fault.damage not in (None, PROGRAM) and len(self._intact()) < 2:
                return False  # it may not lose its last intact checkpoint: nothing could help then
            if fault.stop == "kill in save":
                return self.run.step() >= fault.step and self.run.unfinished() - left_behind
            if fault.stop == "kill a data worker":
                workers[:] = data_workers(process)
                return self.run.step() >= fault.step and workers
            return fault.step is None or self.run.step() >= fault.step

        wait_for(due, str(fault), self.log)
        logged_before = "continuing" in self.log.read_text() and self.run.step() > 0
        time.sleep(fault.delay)
        self._stop(fault.stop, process, workers)
        statuses = []

        def gone():
            statuses.extend([status] if (status := ended(process)) is not None else [])
            return statuses

        wait_for(gone, f"the end after {fault.stop!r}", self.log)
        wait_for(lambda: not any(_command_line(w) for w in workers), "the data workers", self.log)
        self._check(fault, statuses[0], in_loop=fault.step is not None and logged_before)
        stopped_at = self._account()
        what = f"{fault.stop}, status {statuses[0]}"
        if fault.damage:
            what += f"; {self._damage(fault.damage)}"
        return f"{what} at step {stopped_at}, {time.monotonic() - began:.1f} s"

    def _stop(self, how: str, process: int, workers: list[int]):
        if how in ("kill", "kill in save"):
            os.kill(process, signal.SIGKILL)
        elif how == "kill a data worker":
            os.kill(self.rng.choice(workers), signal.SIGKILL)
        elif how == "disk full":
            files = [p.stat().st_size for p in self.run.checkpoints.glob("*/state/**/*")]
            room = int(self.rng.random() * max(files, default=10_000))
            resource.prlimit(process, resource.RLIMIT_FSIZE, (room, room))
        else:
            os.kill(process, signal.SIGTERM)
            if how == "sigterm twice":
                time.sleep(self.rng.uniform(0, 0.2))
                os.kill(process, signal.SIGTERM)

    def _check(self, fault: Fault, status: int, in_loop: bool):
        """Exit statuses are a promise, too."""
        allowed = {
            "kill": {-9},
            "kill in save": {-9},
            # While Python starts there is nothing to save, and nobody who could.
            "sigterm": {143} if in_loop else {143, -15},
            "sigterm twice": {143, -15},
            "kill a data worker": {1},
            "disk full": {1, 2},  # 2 if it is full before training begins
        }[fault.stop]
        if status not in allowed:
            raise Failure(f"status {status} after {fault.stop!r}; see {self.log}")
        # A second signal ends it at once, without a save.
        saves = status == 143 and in_loop and fault.stop == "sigterm"
        if saves and self._intact()[-1][0] < self.run.step():
            raise Failure(f"stopped at step {self.run.step()}, but it was not saved")

    def _account(self) -> int:
        """Counts the steps that were done again since the start before; the step reached now."""
        log = self.log.read_text(errors="replace")
        self.noticed += len(re.findall("is damaged and will not be used", log))
        self.compiled_anew += len(re.findall("is damaged: it is compiled anew", log))
        if found := re.search(r"from the checkpoint of step (\d+)", log):
            self.lost.append(max(0, self.reached - int(found[1])))
            self.reached = 0
        self.reached = max(self.reached, self.run.step())
        return self.run.step()

    def _intact(self) -> list[tuple[int, int]]:
        return [saved for saved in self.run.saved() if saved not in self.damaged]

    def _damage_program(self) -> str:
        """Of a start that is not there any more; nothing that was half written."""
        file = self.rng.choice(sorted(p for p in self.programs.iterdir() if p.suffix != ".tmp"))
        content = bytearray(file.read_bytes())
        if truncate := self.rng.random() < 0.5:
            content = content[: self.rng.randrange(len(content))]
        else:
            content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
        file.write_bytes(content)
        return f"{'truncate' if truncate else 'flip a bit of'} a compiled program"

    def _damage(self, how: str) -> str:
        if how == PROGRAM:
            return self._damage_program()
        newest = self.run.saved()[-1]
        self.damaged.add(newest)
        folder = self.run.checkpoints / str(newest[0])
        files = sorted(p for p in folder.rglob("*") if p.is_file() and p.stat().st_size)
        file = self.rng.choice(files)
        content = bytearray(file.read_bytes())
        if how == "delete a file":
            file.unlink()
        elif how == "truncate a file":
            file.write_bytes(content[: self.rng.randrange(len(content))])
        else:
            content[self.rng.randrange(len(content))] ^= 1 << self.rng.randrange(8)
            file.write_bytes(content)
        return f"{how}, {file.relative_to(self.run.checkpoints)}"

    def finish(self) -> None:
        finish(self.arguments, self.log)
        self._account()


def finish(arguments: list[str], log: pathlib.Path) -> None:
    """Lets the program train to its end."""
    _, status = os.waitpid(start(arguments, log), 0)
    if status := os.waitstatus_to_exitcode(status):
        raise Failure(f"an undisturbed start ended with status {status}; see {log}")


def differences(one: pathlib.Path, other: pathlib.Path) -> list[str]:
    """Paths of all arrays of the last checkpoints that are not the same to the bit."""
    (step, arrays, _), (other_step, others, _) = (
        Checkpoints(path / "checkpoints").restore() for path in (one, other)
    )
    if step != other_step or arrays.keys() != others.keys():
        return [f"step {step} with {len(arrays)} arrays, step {other_step} with {len(others)}"]
    return [path for path in arrays if arrays[path].tobytes() != others[path].tobytes()]


def parse(troubles: str, default: int) -> argparse.Namespace:
    """What the command line asks for: how many, `seed`, `folder` and whether to `keep` it."""
    parser = argparse.ArgumentParser()
    parser.add_argument(f"--{troubles}", type=int, default=default)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=pathlib.Path, help="to keep what was written")
    options = parser.parse_args()
    options.keep = options.folder is not None
    options.folder = options.folder or pathlib.Path(tempfile.mkdtemp(prefix=f"{troubles}-"))
    options.folder.mkdir(parents=True, exist_ok=True)
    return options


def verdict(options: argparse.Namespace, disturbed: pathlib.Path) -> int:
    """Says which arrays a run has otherwise than the one in `undisturbed`; the exit status."""
    different = differences(options.folder / "undisturbed", disturbed)
    print(f"arrays that differ from the undisturbed run: {', '.join(different) or 'none'}")
    if not options.keep:
        shutil.rmtree(options.folder)
    return 1 if different else 0


def main() -> int:
    options = parse("faults", 300)
    folder = options.folder
    for slow in ("hybrid_flax.cli", "sklearn.datasets", "tensorboardX", "matplotlib.pyplot"):
        importlib.import_module(slow)

    epochs = 1 + (options.faults * STEPS_PER_FAULT + 10) // STEPS_PER_EPOCH
    arguments = ["--config=tests/chaos.py", f"--config.epochs={epochs}"]
    arguments.append(f"--compilation_cache={folder}/compiled")  # of all starts
    faults = plan(options.faults, epochs * STEPS_PER_EPOCH - 10, options.seed)
    began, count = time.monotonic(), 0
    print(f"seed {options.seed}, {epochs * STEPS_PER_EPOCH} steps, in {folder}", flush=True)
    chaos = Chaos(folder, arguments, options.seed)
    try:
        finish([*arguments, f"--workdir={folder}/undisturbed"], folder / "log.txt")
        undisturbed = time.monotonic() - began
        for fault in faults:
            count += 2 if fault.damage else 1
            print(f"{count:4d}  {chaos.disturb(fault)}", flush=True)
        chaos.finish()
    except Failure as failure:
        print(f"FAILED at fault {count}, seed {options.seed}: {failure}")
        return 1
    kinds = collections.Counter(fault.stop for fault in faults)
    kinds += collections.Counter(fault.damage for fault in faults if fault.damage)
    print(f"{kinds.total()} faults in {len(faults)} stops:")
    for kind, number in kinds.items():
        print(f"  {number:4d}  {kind}")
    print(f"{chaos.noticed} times a damaged checkpoint was refused")
    print(f"{chaos.compiled_anew} times a damaged program was compiled anew")
    print(f"{sum(chaos.lost)} steps done again, at most {max(chaos.lost)} after one stop")
    print(f"{time.monotonic() - began:.0f} s, {undisturbed:.0f} s of them for the undisturbed run")
    return verdict(options, chaos.run.path)


if __name__ == "__main__":
    sys.exit(main())
