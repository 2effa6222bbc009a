import errno
import fcntl
import json
import os
import shutil

import pytest

from hybrid_flax.errors import InputError
from hybrid_flax.run.workdir import Workdir
from tests import tiny


def enter(folder):
    with Workdir(str(folder), tiny.settings()) as run:
        return run


def test_what_cannot_be_written_renamed_or_read_back_is_found_first(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(
            ValueError,
            match=rf"cannot write to the work directory {tmp_path}: Disk quota exceeded. Choose "
            "another --workdir, or mend its permissions, quota or disk",
        ):
            enter(tmp_path)
    with monkeypatch.context() as patch:
        write = Workdir.write_text
        patch.setattr(Workdir, "write_text", lambda self, name, text: write(self, name, text[:5]))
        with pytest.raises(
            ValueError,
            match=r"does not give back what was written to it \(128 characters, 5 read\). Choose",
        ):
            enter(tmp_path)


def test_the_probe_leaves_nothing(tmp_path):
    enter(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".lock", "config.json", "versions.json"]


def began(folder):
    """A run that could be continued."""
    enter(folder)
    (folder / "checkpoints" / "1" / "state").mkdir(parents=True)


@pytest.mark.parametrize(
    "content",
    [b"", b'{"a"', b"[]", b"5", b"\xff\xfe", b"[" * 10**5, b'{"seed": ' + b"1" * 5000 + b"}",
     b'{"model": 5, "model.name": 6}', b'{"seed.a": 1, "seed": 1, "seed.b": 2}'],
)  # fmt: skip
def test_a_damaged_config_is_refused_by_name(tmp_path, content):
    began(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError) as error:
        enter(tmp_path)
    assert f"{tmp_path}/config.json is damaged: " in str(error.value) or (
        f"{tmp_path} holds another run" in str(error.value)
    )
    assert "another --workdir" in str(error.value)
    assert (tmp_path / "config.json").read_bytes() == content


@pytest.mark.parametrize("content", [b"", b'{"a"', b"[]", b"\xff\xfe"])
def test_damaged_versions_are_a_warning(tmp_path, content, caplog):
    began(tmp_path)
    (tmp_path / "versions.json").write_bytes(content)
    enter(tmp_path)
    assert f"{tmp_path}/versions.json is damaged: " in caplog.text
    assert "jax" in json.loads((tmp_path / "versions.json").read_text())


NAMES = ("config.json", "versions.json", ".lock")


@pytest.mark.parametrize("name", [*NAMES, *(f"{name}.tmp" for name in NAMES[:2])])
def test_nothing_is_written_through_a_link(tmp_path, name):
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "mine").write_text('{"mine": 1}')
    (run / name).symlink_to(tmp_path / "mine")
    if name == ".lock":
        with pytest.raises(InputError, match=rf"{run}/\.lock: it is a link, and nothing goes thro"):
            enter(run)
    else:
        enter(run)
        assert not (run / name).is_symlink()
    assert (tmp_path / "mine").read_text() == '{"mine": 1}'


@pytest.mark.parametrize("name", ["config.json", "versions.json", ".lock"])
def test_a_pipe_in_the_place_of_a_file_is_named_and_not_waited_for(tmp_path, name):
    began(tmp_path)
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    if name == "versions.json":
        enter(tmp_path)
    else:
        with pytest.raises(InputError, match=name):
            enter(tmp_path)


def test_a_finished_run_without_checkpoints_is_not_begun_anew(tmp_path):
    began(tmp_path)
    line = {"start": 1, "step": 10, "time": 1.0, "elapsed": 1.0, "seconds": {}}
    (tmp_path / "ledger.jsonl").write_text(json.dumps(line | {"finished": True}))
    enter(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "1")
    for _ in range(2):
        with pytest.raises(
            InputError, match=f"{tmp_path} holds the records of a run that was finished at step 10"
        ):
            enter(tmp_path)
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
    (tmp_path / "ledger.jsonl").write_text(json.dumps(line))
    enter(tmp_path)


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    enter(tmp_path)
    assert f"{tmp_path}: this file system has no locks (No locks available)" in caplog.text


def test_what_belongs_to_somebody_else_is_named(tmp_path, monkeypatch):
    original = os.open

    def refuse(file, flags, *rest):
        if str(file).endswith(".lock"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), file)
        return original(file, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(
        InputError, match=rf"work directory {tmp_path}: {tmp_path}/\.lock: Permission denied. Mend"
    ):
        enter(tmp_path)


def test_a_folder_that_was_moved_or_removed_is_noticed(tmp_path):
    with Workdir(str(tmp_path / "run"), tiny.settings()) as run:
        run.check_there()
        os.rename(tmp_path / "run", tmp_path / "moved")
        with pytest.raises(FileNotFoundError):
            run.check_there()
        (tmp_path / "run").mkdir()
        with pytest.raises(FileNotFoundError, match="it is another folder now"):
            run.check_there()


def test_a_name_that_is_no_text_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"a\\udcff': its name cannot be written as UTF-8"):
        Workdir(f"{tmp_path}/a\udcff", tiny.settings())
