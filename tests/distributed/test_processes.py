"""Real processes on this machine: JAX's own distributed runtime, with gloo between CPUs."""

import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from hybrid_flax.distributed import processes
from hybrid_flax.run.checkpoints import Checkpoints
from hybrid_flax.run.metrics import read_metrics


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Two devices per process; what one run compiles, the next finds."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("jax-cache")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2"),
    }


class Group:
    """Processes of one program, their output in files."""

    def __init__(self, environment, folder, count, program, *arguments):
        folder.mkdir(parents=True, exist_ok=True)
        self.logs = [folder / f"{i}.log" for i in range(count)]
        port = free_port()
        self.processes = []
        for i, log in enumerate(self.logs):
            command = [sys.executable, "-u", *program, f"--coordinator=127.0.0.1:{port}"]
            command += [f"--num_processes={count}", f"--process_id={i}", *arguments]
            with open(log, "w") as file:
                self.processes.append(
                    subprocess.Popen(command, env=environment, stdout=file, stderr=file)
                )

    def wait(self, timeout=300):
        """Their exit statuses."""
        try:
            return [process.wait(timeout) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def text(self, i):
        return self.logs[i].read_text()

    def until(self, i, text, timeout=200):
        """Waits for a text in the log of process i."""
        end = time.monotonic() + timeout
        while text not in self.text(i):
            assert time.monotonic() < end, self.text(i)
            assert self.processes[i].poll() is None, self.text(i)
            time.sleep(0.1)


def training(environment, workdir, count=2, *arguments):
    program = ["-m", "tests.toy", "--config=tests/toy.py", f"--workdir={workdir}"]
    settings = ["--peer_timeout=15", "--config.batch_size=64", "--config.epochs=1"]
    settings.append("--config.schedule.decay_epochs=1")  # else each process warns of it
    settings += ["--config.checkpoint.every_steps=4", "--config.log_every_steps=1"]
    settings += ["--config.dataset.train_split=train", "--config.dataset.val_split=val"]
    logs = workdir.parent / f"{workdir.name}-logs"
    return Group(environment, logs, count, program, *settings, *arguments)


@pytest.fixture(scope="module")
def undisturbed(environment, tmp_path_factory):
    """The work directory of a run of two processes with two devices each."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    group = training(environment, workdir)
    assert group.wait() == [0, 0], group.text(0) + group.text(1)
    return workdir, group


def losses(workdir):
    records = read_metrics(workdir / "metrics.jsonl")
    return {r["step"]: r["train/loss"] for r in records if "train/loss" in r}


def test_only_the_first_process_speaks_and_writes(undisturbed):
    workdir, group = undisturbed
    assert "on 4 cpu device(s) of 2 processes" in group.text(0)
    assert "finished: 22 steps of unified_convnext_micro" in group.text(0)
    said = [line for line in group.text(1).splitlines() if line and "Gloo" not in line]
    assert not said
    assert Checkpoints(workdir / "checkpoints").steps()[-1] == 22
    last = read_metrics(workdir / "metrics.jsonl")[-1]
    assert last["val/images"] == 360  # each once, whoever read it


def test_one_process_learns_the_same_from_the_same_images(undisturbed, environment, tmp_path):
    """Four devices of one process instead of two and two: rounding apart, the same losses."""
    workdir = tmp_path / "alone"
    four = environment | {"XLA_FLAGS": environment["XLA_FLAGS"].replace("count=2", "count=4")}
    assert training(four, workdir, 1).wait() == [0]
    got, want = losses(workdir), losses(undisturbed[0])
    for step in range(1, 6):
        assert got[step] == pytest.approx(want[step], rel=1e-4)


def test_a_signal_to_one_saves_all_and_another_mesh_goes_on(undisturbed, environment, tmp_path):
    workdir = tmp_path / "stopped"
    group = training(environment, workdir)
    group.until(0, "step 6/22")
    group.processes[1].send_signal(signal.SIGTERM)
    assert group.wait() == [143, 143], group.text(0) + group.text(1)
    assert "stopped by SIGTERM; step" in group.text(0)
    step = Checkpoints(workdir / "checkpoints").steps()[-1]
    assert 6 < step < 22
    # Continued by one process whose devices hold parts of the state; then by two again.
    four = environment | {"XLA_FLAGS": environment["XLA_FLAGS"].replace("count=2", "count=4")}
    group = training(four, workdir, 1, "--config.mesh.fsdp=4")
    group.until(0, f"step {step + 2}/22")
    group.processes[0].send_signal(signal.SIGTERM)
    assert group.wait() == [143], group.text(0)
    assert f"continuing from the checkpoint of step {step}" in group.text(0)
    assert "fsdp" in group.text(0)
    assert training(environment, workdir, 2, "--config.mesh.fsdp=2").wait() == [0, 0]
    got, want = losses(workdir), losses(undisturbed[0])
    assert got.keys() == want.keys()
    assert got[22] == pytest.approx(want[22], rel=0.02)


def test_an_error_of_one_ends_all_and_says_whose_it_was(environment, tmp_path):
    (tmp_path / "file").write_text("no folder")  # where only the first looks
    group = training(environment, tmp_path / "file")
    assert group.wait() == [2, 2], group.text(1)
    assert "error: cannot write to the work directory" in group.text(0)
    assert re.search(r"error: process 0 of 2 on .* stopped: cannot write to", group.text(1))


def test_processes_that_were_started_differently_are_refused(environment, tmp_path):
    what = """
from tests import toy

images = {"0": "train[:96]", "1": "train[:80]"}[process]
toy.train(toy.get_config(seed=int(process), dataset__train_split=images), sys.argv[0] + ".run")
"""
    group = parts(environment, tmp_path, what)
    group.until(1, "started with other settings, data or code than the first one")
    group.wait(60)
    assert "  seed: there 0, here 1" in group.text(1)
    assert "  dataset.train_split: there 'train[:96]', here 'train[:80]'" in group.text(1)
    assert "  data 0.images: there 96, here 80" in group.text(1)


# ------------------------------------------------------------------------------- the parts alone

PARTS = """
import sys, time
from hybrid_flax.distributed import processes
from hybrid_flax.errors import TrainingError
{before}
coordinator, count, process = (argument.split("=")[1] for argument in sys.argv[2:5])
processes.start(coordinator, int(count), int(process), timeout=15)
{what}
"""


def parts(environment, tmp_path, what, count=2, before=""):
    program = tmp_path / "parts.py"
    program.write_text(PARTS.format(what=what, before=before))
    folder = os.getcwd()
    return Group(environment | {"PYTHONPATH": folder}, tmp_path, count, [str(program), "-"])


@pytest.mark.slow
def test_the_log_names_the_process_that_reads_slowly(environment, tmp_path):
    what = """
from hybrid_flax.data import feed
from tests import toy

make_batches = feed.train_batches

def slowly(*args, **kwargs):
    for batch in make_batches(*args, **kwargs):
        time.sleep(1.0)
        yield batch

if process == "1":
    feed.train_batches = slowly
config = toy.get_config(
    batch_size=16, dataset__train_split="train[:96]", dataset__val_split="val[:16]", epochs=1
)
toy.train(config, sys.argv[0] + ".run")
"""
    group = parts(environment, tmp_path, what)
    assert group.wait() == [0, 0], group.text(0) + group.text(1)
    assert re.search(r"step 4/6: .* process 1 waited \d\.\d s for input", group.text(0))


def test_only_the_first_reads_checkpoints(undisturbed, environment, tmp_path):
    workdir, _ = undisturbed
    what = f"""
from hybrid_flax.distributed.mesh import make_mesh
from hybrid_flax.settings import from_config
from hybrid_flax.start import initial_weights
from hybrid_flax.weights.paths import flatten
from tests import toy

folder = {{"0": {str(workdir)!r}, "1": "nowhere"}}[process]
config, mesh = from_config(toy.get_config(init_from=folder)), make_mesh()
weights = flatten(initial_weights(config, toy.program(config, mesh, 1).fresh, mesh))
print("sum", sum(float(abs(array).sum()) for array in weights.values()))
"""
    group = parts(environment, tmp_path, what)
    assert group.wait() == [0, 0], group.text(0) + group.text(1)
    arrays = Checkpoints(workdir / "checkpoints").restore().arrays
    want = sum(abs(array).sum() for name, array in arrays.items() if name.startswith("ema/"))
    for i in range(2):
        assert float(re.search(r"^sum (.*)$", group.text(i), re.M)[1]) == pytest.approx(want)


def test_what_the_first_knows_all_know_and_all_hear_everyone(environment, tmp_path):
    what = """
first = processes.from_first("look", lambda: {"place": processes.name().split(" on ")[0]})
print(first, processes.everyone("count", f"I am {process}"))
"""
    group = parts(environment, tmp_path, what, 3)
    assert group.wait() == [0, 0, 0]
    for i in range(3):
        assert "{'place': 'process 0 of 3'} ['I am 0', 'I am 1', 'I am 2']" in group.text(i)


def test_waiting_is_bounded_and_names_who_is_missing(environment, tmp_path):
    what = """
import os
processes.name()  # JAX on the CPU has no devices before all have come
done = sys.argv[0] + ".done"
while process == "1" and not os.path.exists(done):
    time.sleep(0.1)
try:
    processes.everyone("restore", "", patience=3)
except TrainingError as error:
    print("error:", error, flush=True)
    open(done, "w").close()
"""
    group = parts(environment, tmp_path, what)
    group.wait()
    assert "waited 3 s to restore: of 2 processes 1 did not come" in group.text(0)


@pytest.mark.parametrize("alone", ["0", "1"])
def test_a_process_whose_others_are_not_started_says_so(environment, tmp_path, alone):
    before = f"""
processes._JOINING = 3
if sys.argv[4] != "--process_id={alone}":
    raise SystemExit
"""
    group = parts(environment, tmp_path, "", before=before)
    statuses = group.wait(60)
    assert statuses[int(alone)] == 2
    assert f"error: process {alone} of 2 waited 3 s for the others at 127.0" in group.text(
        int(alone)
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("h:1", None, None), "--coordinator=h:1: --coordinator=HOST:PORT, --num_processes=N and"),
        ((None, 2, 0), "--num_processes=2, --process_id=0: --coordinator=HOST:PORT"),
        (("host", 2, 0), "--coordinator=host, --num_processes=2, --process_id=0: expected HOST"),
        (("host:http", 2, 0), "--coordinator=host:http, --num_processes=2, --process_id=0: expect"),
        (("h:1", 2, 2), "--process_id=2: expected HOST:PORT, and a process_id from 0 to below"),
    ],
)
def test_flags_that_cannot_be_used_are_named(flags, message):
    with pytest.raises(ValueError) as error:
        processes.start(*flags)
    assert message in str(error.value)


def test_patience_of_no_seconds_is_refused():
    with pytest.raises(ValueError, match="--peer_timeout=0: expected 5 seconds or more"):
        processes.start(timeout=0)


def test_a_port_that_is_taken_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"--coordinator={address}: process 0 cannot listen"):
            processes.start(address, 2, 0)


def test_slurm_and_open_mpi_are_found_without_flags(environment, tmp_path):
    what = 'print("joined", processes.name().split(" on ")[0])'
    program = tmp_path / "found.py"
    program.write_text(
        "from hybrid_flax.distributed import processes\nprocesses.start(timeout=15)\n" + what
    )
    port = free_port()
    clusters = {
        "slurm": {
            "SLURM_JOB_ID": "7",
            "SLURM_STEP_NODELIST": "127.0.0.1",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": "{}",
            "SLURM_LOCALID": "{}",
        },
        "open mpi": {
            "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_RANK": "{}",
            "OMPI_COMM_WORLD_LOCAL_RANK": "{}",
        },
    }
    for name, variables in clusters.items():
        started = [
            subprocess.Popen(
                [sys.executable, str(program)],
                env=environment
                | {"PYTHONPATH": os.getcwd(), "JAX_COORDINATOR_PORT": str(port)}
                | {key: value.format(i) for key, value in variables.items()},
                stdout=subprocess.PIPE,
                text=True,
            )
            for i in range(2)
        ]
        said = [process.communicate(timeout=60)[0] for process in started]
        assert [f"joined process {i} of 2" in text for i, text in enumerate(said)] == [True] * 2, (
            name
        )
