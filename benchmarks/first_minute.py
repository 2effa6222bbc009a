"""How long a start takes, from the command to the end of the first step, and where it goes.

python -m benchmarks.first_minute [--save=benchmarks/results/first_minute_cpu.json]

Every start is a process of its own, as a user makes it, on this machine's CPU. A first start finds
no compiled program, a second one finds those of the first; what a second start is compared with has
no cache (`--compilation_cache=off`). Seconds are those of the run's own ledger. Then a small run is
killed (SIGKILL) at random moments and started again: from the kill to the end of the next step.
"""

import argparse
import contextlib
import os
import pathlib
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from hybrid_flax.costs import records
from hybrid_flax.run.ending import ending
from hybrid_flax.run.goodput import read_ledger

SUBJECTS = {
    "quickstart": ["--config=configs/quickstart.py"],
    "gcvit_b, batch 2": [
        "--config=configs/gcvit_b.py",
        "--config.batch_size=2",
        "--config.augment.mix_group=0",
        "--config.model.dtype=float32",
        "--config.dataset.name=digits",
        "--config.dataset.num_workers=0",
        "--config.eval.batch_size=2",
    ],
}
KILLED = ["--config=tests/tiny.py", "--config.epochs=10000", "--config.eval.every_epochs=10000"]
_PATIENCE = 1800.0  # seconds for a start
_POLL = 0.005


def first_steps(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The ledger's lines at which a first step was done, one for each start."""
    file = workdir / "ledger.jsonl"
    return [line for line in read_ledger(str(file)) if "compiled" in line]


@contextlib.contextmanager
def started(workdir: pathlib.Path, arguments: list[str]) -> Iterator[subprocess.Popen]:
    """A training run in a process of its own, until it has done a step; killed on leaving."""
    log = workdir.with_suffix(".log")
    done, began = len(first_steps(workdir)), time.monotonic()
    command = [sys.executable, "-m", "hybrid_flax.main", f"--workdir={workdir}", *arguments]
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        while len(first_steps(workdir)) == done:
            if process.poll() is not None or time.monotonic() - began > _PATIENCE:
                raise InputError(f"no step was done: {log.read_text()[-2000:]}")
            time.sleep(_POLL)
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def start(folder: pathlib.Path, arguments: list[str]) -> dict[str, Any]:
    """One start in a new work directory: seconds to the end of its first step, and their parts."""
    workdir = pathlib.Path(tempfile.mkdtemp(dir=folder)) / "run"
    with started(workdir, arguments) as process:
        processor = _processor_seconds(process.pid)
        lines = read_ledger(str(workdir / "ledger.jsonl"))
        (line,) = first_steps(workdir)
    parts: dict[str, float] = {}
    for each in lines[: lines.index(line) + 1]:
        for kind, seconds in each["seconds"].items():
            parts[kind] = round(parts.get(kind, 0.0) + seconds, 2)
    return {
        "seconds": line["elapsed"],
        "processor_seconds": processor,
        "parts": parts,
        "step": line["compiled"],
    }


def _processor_seconds(process: int) -> float:
    """What a process has used so far: on a busy machine it says more than the clock."""
    fields = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def kills(folder: pathlib.Path, count: int) -> list[float]:
    """Seconds from a SIGKILL to the end of the next step, for so many of them."""
    rng, workdir, took = random.Random(0), folder / "killed", []
    arguments = [*KILLED, f"--compilation_cache={folder}/killed-programs"]
    killed_at: float | None = None
    for _ in range(count + 1):
        with started(workdir, arguments) as process:
            if killed_at is not None:
                took.append(time.monotonic() - killed_at)
            time.sleep(rng.uniform(0, 3))
            process.send_signal(signal.SIGKILL)
            killed_at = time.monotonic()
    return took


def main() -> int:
    return ending(_main, limited=False) or 0


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", type=pathlib.Path, help="file for the figures")
    parser.add_argument("--subjects", default=",".join(SUBJECTS), help="of them, and kills")
    parser.add_argument("--kills", type=int, default=50, help="0: none")
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    records.check_file("--save", options.save)
    return measure(options)


def measure(options: argparse.Namespace) -> int:
    """Measures, prints and saves."""
    record = {**records.record(), "load_before": os.getloadavg()[0], "starts": {}}
    print(f"{'':<18}{'no cache':>10}{'first':>10}{'second':>10}{'of it, first step':>20}")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = pathlib.Path(name)
        for subject, arguments in SUBJECTS.items():
            if subject not in options.subjects:
                continue
            cache = f"--compilation_cache={folder}/programs"
            found = {
                "no cache": start(folder, [*arguments, "--compilation_cache=off"]),
                "first": start(folder, [*arguments, cache]),
                "second": start(folder, [*arguments, cache]),
            }
            record["starts"][subject] = found
            figures = "".join(f"{found[kind]['seconds']:>10.1f}" for kind in found)
            print(f"{subject:<18}{figures}{found['second']['parts']['first step']:>20.1f}")
            for kind, each in found.items():
                print(f"  {kind}: {each}", flush=True)
        if options.kills:
            took = kills(folder, options.kills)
            record["seconds_from_kill_to_next_step"] = [round(each, 2) for each in took]
            record["median_and_worst"] = [round(statistics.median(took), 2), round(max(took), 2)]
            print(f"{len(took)} kills: {record['median_and_worst']} s, median and worst")
    record["load_after"] = os.getloadavg()[0]
    if options.save:
        records.save(options.save, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
