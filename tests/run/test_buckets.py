"""Work directories on object storage: a real driver, gcsfs, and a server in this process."""

import json
import logging
import os
import pathlib
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from gcp_storage_emulator import server as emulator

from hybrid_flax.errors import InputError, TrainingError
from hybrid_flax.run.checkpoints import Checkpoints, CheckpointSaveError
from hybrid_flax.run.compilation_cache import CompilationCache
from hybrid_flax.run.metrics import read_metrics
from hybrid_flax.run.saved_weights import load_weights
from hybrid_flax.run.storage import mirror
from hybrid_flax.run.storage.bucket import Bucket
from hybrid_flax.run.storage.bucket_steps import COMPLETE
from hybrid_flax.run.workdir import Workdir
from tests import tiny, toy
from tests.end_to_end.same_bits import assert_same_bits, final_arrays

# gcsfs gives aiohttp large bodies as bytes.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")


def read_exactly(handler, query, original=emulator._read_data):
    """The body of a request; the emulator reads those with two parts as e-mail.

    Which ends a line before the boundary with CR LF as well as with LF: of data that end with CR
    it loses a byte.
    """
    kind = handler.headers.get("Content-Type") or ""
    if not kind.startswith("multipart/related"):
        return original(handler, query)
    boundary = kind.partition("boundary=")[2].strip('"').encode()
    body = emulator._decode_raw_data(emulator._read_raw_data(handler), handler)
    _, meta, rest = body.split(b"--" + boundary + b"\n", 2)
    head, _, content = rest.partition(b"\n\n")
    return {
        "meta": json.loads(meta.partition(b"\n\n")[2]),
        "content": content.removesuffix(b"\n--" + boundary + b"--"),
        "content-type": head.decode().partition(": ")[2],
    }


@pytest.fixture(scope="module", autouse=True)
def server():
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        port = sock.getsockname()[1]
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", f"http://localhost:{port}")
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # it asks Google first
        patch.setattr(emulator, "_read_data", read_exactly)
        with emulator.create_server("localhost", port, in_memory=True, default_bucket="bucket"):
            yield


@pytest.fixture
def url(request):
    """Of a folder that no other test uses."""
    return f"gs://bucket/{request.node.name}"


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(mirror, "_REFRESH", 0.1)
    monkeypatch.setattr(mirror, "_SILENT", 2.0)


def no_route(*_):
    raise OSError("no route to host")


def tree(seed):
    rng = np.random.default_rng(seed)
    params = {"kernel": rng.normal(size=(300, 70)), "bias": rng.normal(size=(3,))}
    return {"params": {name: array.astype(np.float32) for name, array in params.items()}}


def saved(url, *steps, **keep):
    checkpoints = Checkpoints(url, **keep)
    for step in steps:
        checkpoints.save(step, tree(step), {"model": "x"})
    checkpoints.wait()
    return checkpoints


def assert_restores(url, step):
    found, arrays, meta = Checkpoints(url).restore(tree(0))
    assert (found, meta) == (step, {"model": "x"})
    for name, array in tree(step)["params"].items():
        assert arrays[f"params/{name}"].tobytes() == array.tobytes()


def test_what_is_stored_is_what_was_sent(url, tmp_path):
    """Of this emulator: see `read_exactly`."""
    ends = (b"", b"\r", b"\n", b"\r\n", b"\n\r", b"--==0==", b"\n--==0==--")
    for number, end in enumerate(ends):
        (tmp_path / str(number)).write_bytes(b"\n\nsome" + end)
    Bucket(url).upload(tmp_path, map(str, range(len(ends))))
    Bucket(url).download(map(str, range(len(ends))), tmp_path / "back")
    for number in range(len(ends)):
        assert (tmp_path / "back" / str(number)).read_bytes() == (
            tmp_path / str(number)
        ).read_bytes()


# ------------------------------------------------------------------------------------ checkpoints


def test_checkpoints_are_kept_and_found_by_another_machine(url):
    checkpoints = saved(f"{url}/checkpoints", 10, 20, 30, 40, keep=2)
    assert not list(checkpoints.directory.iterdir())  # nothing is left here
    assert Checkpoints(f"{url}/checkpoints").steps() == [30, 40]
    assert all(name[:3] in ("30/", "40/") for name in Bucket(f"{url}/checkpoints").names())
    assert_restores(f"{url}/checkpoints", 40)
    assert load_weights(url).step == 40


def test_launch_files_ask_for_the_newest(url):
    def said(workdir):
        command = [sys.executable, "-m", "hybrid_flax.run.checkpoints", workdir]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr.splitlines()[-1:]

    assert said(url) == (0, "", [])
    saved(f"{url}/checkpoints", 10, 20)
    assert said(url) == (0, "20\n", [])
    status, newest, (error,) = said("gs://nowhere/run")
    assert (status, newest) == (2, "")
    assert error.startswith("error: cannot read or change the checkpoints in gs://nowhere/run")


def test_an_upload_that_was_cut_short_is_no_checkpoint(url, monkeypatch):
    saved(url, 10)
    write = Bucket.write

    def fail(self, name, text):
        if name.endswith(COMPLETE):
            raise OSError("connection reset")
        write(self, name, text)

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "write", fail)
        with pytest.raises(
            CheckpointSaveError,
            match=f"step 20 could not be written to {url}: connection reset. The last one there is "
            "of step 10",
        ):
            saved(url, 20)
    assert any(name.startswith("20/") for name in Bucket(url).names())
    checkpoints = Checkpoints(url)
    assert checkpoints.steps() == [10]
    checkpoints.clear_after(10)
    assert all(name.startswith("10/") for name in Bucket(url).names())
    saved(url, 20)
    assert_restores(url, 20)


def test_what_a_run_did_not_make_is_left_alone(url):
    saved(url, 10)
    mine = {"README", "notes/plan", "10-good/state/array", "2024/plan", "7.deleted/x"}
    for name in (*mine, "20/state/d/half", "30/manifest/data.json"):
        Bucket(url).write(name, "x")
    Checkpoints(url).clear_after(10)
    left = set(Bucket(url).names())
    assert {name for name in left if not name.startswith("10/")} == mine
    assert Checkpoints(url).steps() == [10]


def test_a_name_that_leads_out_of_the_folder_is_not_copied(url, tmp_path):
    with pytest.raises(OSError, match="has an object whose name leads out of it: a/../../b"):
        Bucket(url).download(["a/../../b"], tmp_path)


def test_a_damaged_one_is_named_and_set_aside(url, caplog):
    saved(f"{url}/checkpoints", 10, 20)
    manifest = next(n for n in Bucket(f"{url}/checkpoints").names("20") if "manifest/data" in n)
    Bucket(f"{url}/checkpoints/20").write(manifest, "{}")
    checkpoints = Checkpoints(f"{url}/checkpoints")
    assert checkpoints.restore()[0] == 10
    assert f"checkpoint {url}/checkpoints/20 is damaged and will not be used" in caplog.text
    checkpoints.clear_after(10)
    assert f"damaged checkpoint of step 20 to {url}/damaged/20" in caplog.text
    assert checkpoints.steps() == [10]
    assert manifest in Bucket(f"{url}/damaged/20").names()


def test_an_outage_does_not_make_a_checkpoint_a_damaged_one(url, monkeypatch):
    saved(url, 10, 20)

    message = f"cannot read or change the checkpoints in {url}: no route to host. Nothing is lost"
    for operation in ("download", "names", "delete"):
        Bucket(url).write("30/half", "")
        with monkeypatch.context() as patch:
            patch.setattr(Bucket, operation, no_route)
            with pytest.raises(TrainingError, match=message):
                Checkpoints(url).clear_after(Checkpoints(url).restore()[0])
    assert Checkpoints(url).steps() == [10, 20]
    with pytest.raises(TrainingError, match="checkpoints in gs://nowhere/run/checkpoints: "):
        load_weights("gs://nowhere/run")


def cut_short(copy):
    """`Bucket.download` that leaves one file empty."""

    def copied(self, names, folder, top):
        copy(self, names, folder, top)
        max(pathlib.Path(folder).rglob("d/*")).write_text("")

    return copied


def test_a_copy_that_was_cut_short_is_not_taken_for_damage(url, monkeypatch):
    saved(url, 10)
    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "download", cut_short(Bucket.download))
        with pytest.raises(
            TrainingError, match=r"not whole: 0 bytes here, \d+ there. Nothing is l"
        ):
            Checkpoints(url).restore()
    assert_restores(url, 10)


def test_a_checkpoint_that_did_not_arrive_whole_does_not_count(url, monkeypatch):
    upload = Bucket.upload
    monkeypatch.setattr(
        Bucket, "upload", lambda self, folder, names, to: upload(self, folder, names[1:], to)
    )
    checkpoints = Checkpoints(url)
    checkpoints.save(10, tree(10), {})
    with pytest.raises(
        CheckpointSaveError, match="step 10 could not be .* is not whole: .* 0 there"
    ):
        checkpoints.wait()
    assert Checkpoints(url).steps() == []


def test_an_outage_while_saving_names_the_step(url, monkeypatch):
    for operation in ("upload", "names"):
        checkpoints = saved(url)
        checkpoints.save(10, tree(10), {})
        with monkeypatch.context() as patch:
            patch.setattr(Bucket, operation, no_route)
            with pytest.raises(CheckpointSaveError, match=f"step 10 could not be written to {url}"):
                checkpoints.wait()


def test_there_is_room_here_for_one(url, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match="has .*left. Free some, or set TMPDIR to a folder on"):
        Checkpoints(url).check_space(tree(0))


# ------------------------------------------------------------------------------------------- runs


def test_a_stopped_run_goes_on_from_the_bucket_to_the_bit(url, tmp_path, monkeypatch, capsys):
    config = toy.get_config()
    assert toy.train(config, tmp_path / "local") == 0
    assert toy.train(config, url, build=toy.stopping(signal.SIGTERM, after=6)) == 143
    assert Checkpoints(f"{url}/checkpoints").steps()[-1] == 7
    assert ".lock" not in Bucket(url).names()
    assert toy.train(config, url) == 0
    assert "continuing from the checkpoint of step 7" in capsys.readouterr().out
    assert_same_bits(final_arrays(url), final_arrays(tmp_path / "local"))
    names = Bucket(url).names()
    assert {"config.json", "curves.png", "ledger.jsonl", "metrics.jsonl"} < set(names)
    assert sum(name.startswith("events.out.tfevents") for name in names) == 2
    assert not any(name.startswith(("damaged/", ".")) for name in names)
    Bucket(url).download(["metrics.jsonl"], tmp_path)
    losses, others = (
        {r["step"]: r["train/loss"] for r in read_metrics(file) if "train/loss" in r}
        for file in (tmp_path / "metrics.jsonl", tmp_path / "local" / "metrics.jsonl")
    )
    assert losses.keys() == others.keys() | {7}  # when it was stopped
    assert losses[10] == others[10]


def run(url, **settings):
    return Workdir(url, tiny.settings(**settings))


def test_one_run_at_a_time(url, impatient):
    me = f"process {os.getpid()} on .*"
    with run(url):
        with pytest.raises(InputError, match=rf"another process \({me}\) is training in {url}"):
            run(url).__enter__()
    with run(url):  # it was left in order
        pass


def test_what_a_killed_run_held_is_free_after_a_while(url, impatient, caplog):
    Bucket(url).write(".lock", "process 1 on host7, 5\n6")
    with run(url):
        assert f"{url} was left in use by process 1 on host7; waiting up to 2 s" in caplog.text


def test_a_run_that_was_thought_dead_stops(url, impatient):
    workdir = run(url)
    workdir.__enter__()
    Bucket(url).write(".lock", "process 1 on host7, 5\n6")
    with pytest.raises(TrainingError, match=r"another process \(process 1 on host7\) has taken"):
        workdir.push()
    with pytest.raises(TrainingError, match="this one stops, that one goes on"):
        workdir.__exit__()
    assert Bucket(url).read(".lock").startswith("process 1")


def test_records_are_written_again_after_an_outage(url, impatient, monkeypatch, caplog):
    with run(url) as workdir:
        workdir.write_text("parameters.txt", "one")
        with monkeypatch.context() as patch:
            patch.setattr(Bucket, "upload", no_route)
            workdir.push()
        assert f"cannot write to {url}: no route to host. Training goes on" in caplog.text
        workdir.push()
        assert Bucket(url).read("parameters.txt") == "one"


def test_another_run_is_refused(url):
    saved(f"{url}/checkpoints", 10)
    with pytest.raises(InputError, match=f"{url} holds checkpoints but no training run"):
        run(url).__enter__()
    Bucket(url).write("config.json", '{"seed": 2}')
    with pytest.raises(InputError, match="seed: the run has 2, you gave 42"):
        run(url).__enter__()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("gs://nowhere/run", "cannot use the work directory gs://nowhere/run: .*credentials read"),
        ("s3://bucket/run", "s3://bucket/run: Install s3fs to access S3"),
        ("gs:/bucket/run", "gs:/bucket/run: expected a folder in a bucket, such as gs://bucket/ru"),
        ("gs:///run", "gs:///run: expected a folder in a bucket, such as gs://bucket/runs"),
        ("gs://", "gs://: expected a folder in a bucket, such as gs://bucket/runs"),
        ("file:///run", "file:///run: expected .*, or a local one without a scheme"),
        ("http://host/run", "http://host/run: expected a folder in a bucket"),
        ("memory://run", "memory://run: expected a folder in a bucket"),
        ("simplecache::gs://bucket/run", "simplecache::gs://bucket/run: expected a folder in a b"),
        ("gs://::http://host/run", "gs://::http://host/run: expected a folder in a bucket"),
    ],
)
def test_what_is_no_bucket_is_said(url, message):
    with pytest.raises(InputError, match=message):
        run(url).__enter__()


def test_compiled_programs_lie_in_a_bucket_that_may_go_away(url, monkeypatch, caplog):
    CompilationCache(url).put("jit_step-1", b"a program")
    cache = CompilationCache(url)
    assert cache.get("jit_step-1") == b"a program"
    assert cache.get("jit_step-2") is None
    damaged = CompilationCache(url)
    (name,) = Bucket(url).names()
    Bucket(url).write(name, "damaged")
    assert damaged.get("jit_step-1") is None
    assert "the compiled program jit_step in" in caplog.text
    assert Bucket(url).names() == []
    cache.put("jit_step-1", b"a program")
    caplog.clear()
    for method in "download", "upload":
        monkeypatch.setattr(Bucket, method, no_route)
    for _ in range(2):
        assert cache.get("jit_step-1") is None
        cache.put("jit_step-2", b"another")
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "cannot read compiled programs in gs",
        "cannot write compiled programs in gs",
    ]
    monkeypatch.setattr(Bucket, "names", no_route)
    assert CompilationCache(url).get("jit_step-1") is None
    assert f"cannot read or write compiled programs in {url}: no route to host" in caplog.text
