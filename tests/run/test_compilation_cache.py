"""Compiled programs from start to start: found again, and whatever is wrong is a miss."""

import errno
import os
import stat
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import pytest

from hybrid_flax.errors import InputError
from hybrid_flax.run import compilation_cache
from hybrid_flax.run.compilation_cache import OFF, CompilationCache, cached, user_folder
from hybrid_flax.run.compiling import CompiledOnce
from hybrid_flax.run.storage import entries
from hybrid_flax.run.tuning import Tuning
from tests import toy

KEY, VALUE = "jit_step-0123", b"a program" * 100


@pytest.fixture(autouse=True)
def all_are_kept(monkeypatch):
    """Also those that compile in no time."""
    monkeypatch.setattr(compilation_cache, "_SECONDS_WORTH_KEEPING", 0.0)


@pytest.fixture
def folder(tmp_path):
    """Holds one program."""
    CompilationCache(str(tmp_path / "compiled")).put(KEY, VALUE)
    return tmp_path / "compiled"


def compiled(folder):
    """(what a program gives, whether it was found)."""
    with cached(str(folder), OFF):
        jax.clear_caches()
        step = CompiledOnce(jax.jit(lambda x: jnp.sin(x) @ x), "step")
        made = step.compile(jnp.eye(3))
        return step(jnp.eye(3)).tobytes(), made.source == "the cache"


PROGRAM = """
import sys
import jax
from hybrid_flax.run import compilation_cache
compilation_cache._SECONDS_WORTH_KEEPING = 0.0
with compilation_cache.cached(sys.argv[1], "off"):
    print(jax.jit(lambda x: (x * x).sum())(jax.numpy.arange(64.0)), compilation_cache.hits())
"""


def test_a_second_start_finds_what_the_first_compiled(tmp_path):
    """By JAX's own events, in processes of their own."""
    said = [
        subprocess.run(
            [sys.executable, "-c", PROGRAM, str(tmp_path / "compiled")],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=True,
            timeout=300,
        ).stdout.split()
        for _ in range(2)
    ]
    assert said[0] == ["85344.0", "0"]
    assert said[1][0] == "85344.0"
    assert int(said[1][1]) >= 1


def test_a_run_keeps_its_programs_in_its_work_directory(tmp_path, capsys):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)  # which the tests' own is
    try:
        assert toy.train(toy.get_config(epochs=1), tmp_path) == 0
        first = capsys.readouterr().out
        (tmp_path / "checkpoints").rename(tmp_path / "aside")
        (tmp_path / "ledger.jsonl").unlink()
        jax.clear_caches()
        assert toy.train(toy.get_config(epochs=1), tmp_path) == 0
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    second = capsys.readouterr().out
    for step in "training", "evaluation":
        (new,) = (line for line in first.splitlines() if f"compiled the {step} step in" in line)
        assert " s (new: tracing " in new
        (found,) = (line for line in second.splitlines() if f"compiled the {step} step in" in line)
        assert found.endswith(" s (from the cache)")
    assert stat.S_IMODE((tmp_path / "compiled").stat().st_mode) == 0o700


def flip(content, place):
    changed = bytearray(content)
    changed[place] ^= 1
    return bytes(changed)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: flip(content, 0),
        lambda content: flip(content, 40),
        lambda content: flip(content, -1),
        lambda content: content[:-1],
        lambda content: content[:31],
        lambda content: content + b"\0",
        lambda content: b"",
    ],
)
def test_a_damaged_program_is_a_miss_that_is_said(folder, caplog, damage):
    (file,) = folder.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    cache = CompilationCache(str(folder))
    assert cache.get(KEY) is None
    assert f"the compiled program jit_step in {folder} is damaged: it is compiled" in caplog.text
    cache.put(KEY, VALUE)
    assert CompilationCache(str(folder)).get(KEY) == VALUE


def test_a_program_under_the_name_of_another_is_a_miss(folder, caplog):
    (file,) = folder.iterdir()
    cache = CompilationCache(str(folder))
    cache.put("jit_step-4567", b"another")
    (other,) = set(folder.iterdir()) - {file}
    file.replace(other)
    assert cache.get("jit_step-4567") is None
    assert "is damaged" in caplog.text


def test_damage_changes_no_bit_of_what_a_program_gives(tmp_path, caplog):
    want, found = compiled(tmp_path / "compiled")
    assert not found
    assert compiled(tmp_path / "compiled") == (want, True)
    for file in (tmp_path / "compiled").iterdir():
        file.write_bytes(flip(file.read_bytes(), 100))
    assert compiled(tmp_path / "compiled") == (want, False)
    assert "is damaged" in caplog.text
    assert compiled(tmp_path / "compiled") == (want, True)


@pytest.mark.parametrize(
    ("number", "said"), [(errno.ENOSPC, "No space left"), (errno.EROFS, "Read-only file system")]
)
def test_a_folder_that_cannot_be_written_is_read(folder, caplog, monkeypatch, number, said):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    cache = CompilationCache(str(folder))
    monkeypatch.setattr(entries.os, "replace", refuse)
    cache.put("other", VALUE)
    cache.put("third", VALUE)
    assert caplog.text.count(f"cannot write compiled programs in {folder}: {said}") == 1
    assert len(list(folder.iterdir())) == 1  # nothing half written is left
    assert cache.get(KEY) == VALUE
    assert cache.get("other") is None


@pytest.mark.parametrize("instead", ["a file", "a link", "open to others", "somebody else's"])
def test_a_folder_that_others_may_write_to_is_not_used(
    folder, tmp_path, caplog, monkeypatch, instead
):
    if instead == "a file":
        folder.rename(tmp_path / "aside")
        folder.write_text("mine")
    elif instead == "a link":
        folder.rename(tmp_path / "aside")
        folder.symlink_to(tmp_path / "aside")
    elif instead == "open to others":
        folder.chmod(0o777)
    else:
        monkeypatch.setattr(entries.os, "geteuid", lambda: 12345)
    cache = CompilationCache(str(folder))
    assert cache.get(KEY) is None
    cache.put(KEY, VALUE)
    why = {
        "a file": "File exists",
        "a link": "it is no folder",
        "open to others": "others may write to it; take that away with chmod go-w",
        "somebody else's": "it belongs to another user",
    }
    assert [record.message for record in caplog.records] == [
        f"cannot read or write compiled programs in {folder}: {why[instead]}. Programs compile as "
        "without a cache"
    ]
    assert compiled(folder) == compiled(tmp_path / "new")  # without an error


def test_another_jax_and_another_processor_are_misses(folder, monkeypatch):
    monkeypatch.setattr(jax, "__version__", "9.9.9")
    assert CompilationCache(str(folder)).get(KEY) is None
    monkeypatch.undo()
    assert CompilationCache(str(folder)).get(KEY) == VALUE
    monkeypatch.setattr(compilation_cache, "processor", lambda: "x86_64 with fewer flags")
    assert CompilationCache(str(folder)).get(KEY) is None


def test_what_a_kill_leaves_is_no_program_and_goes(folder):
    (folder / "compiled-abc.tmp").write_bytes(b"half")
    (folder / "mine.tmp").write_bytes(b"somebody's")
    CompilationCache(str(folder))
    assert (folder / "compiled-abc.tmp").exists()  # perhaps it is being written
    for file in folder.iterdir():
        os.utime(file, (1e9, 1e9))
    CompilationCache(str(folder))
    assert not (folder / "compiled-abc.tmp").exists()
    assert (folder / "mine.tmp").exists()
    assert CompilationCache(str(folder)).get(KEY) == VALUE


def test_what_was_not_used_for_longest_makes_room(folder, monkeypatch):
    cache = CompilationCache(str(folder))
    (folder / "holiday.jpg").write_bytes(bytes(10_000))
    (first,) = (file for file in folder.iterdir() if file.suffix != ".jpg")
    cache.put("other", VALUE)
    os.utime(first, (1e9, 1e9))
    cache.get(KEY)  # now it was used
    for file in set(folder.iterdir()) - {first}:
        os.utime(file, (1e9, 1e9))
    monkeypatch.setattr(entries, "_LARGEST", len(VALUE) + 100)
    cache = CompilationCache(str(folder))
    assert cache.get("other") is None
    assert cache.get(KEY) == VALUE
    assert (folder / "holiday.jpg").exists()


def test_two_may_write_at_once(folder):
    read = []

    def write():
        cache = CompilationCache(str(folder))
        for _ in range(50):
            cache.put(KEY, VALUE)
            read.append(cache.get(KEY))

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(read) == {VALUE}


def test_processes_that_see_different_folders_use_none(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(compilation_cache, "from_first", lambda _, function: function())
    answers = ["True", "True"]
    monkeypatch.setattr(compilation_cache, "everyone", lambda *_: answers)
    assert compilation_cache._open(str(tmp_path / "compiled")).place == f"{tmp_path}/compiled"
    answers[1] = "False"
    assert compilation_cache._open(str(tmp_path / "compiled")) is None
    assert "processes 1 do not see the compiled programs" in caplog.text


def test_what_xla_found_by_timing_is_packed_and_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tuning = Tuning("gs://bucket/run/compiled")
    file = os.path.join(tuning.folder, "xla_gpu_per_fusion_autotune_cache_dir", "fusion.textproto")
    os.makedirs(os.path.dirname(file))
    with open(file, "wb") as stream:
        stream.write(b"version: 3\n\xff")
    packed = tuning.pack()
    with open(file, "wb") as stream:
        stream.write(b"damaged")
    again = Tuning("gs://bucket/run/compiled")
    again.unpack(packed)
    with open(file, "rb") as stream:
        assert stream.read() == b"version: 3\n\xff"
    assert again.folder == tuning.folder != Tuning("/elsewhere").folder
    assert again.unpack(None) is None


def test_where_programs_are_kept(monkeypatch, tmp_path):
    monkeypatch.setattr(compilation_cache.platform, "system", lambda: "Linux")
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert user_folder() == "/home/me/.cache/hybrid_flax/compiled"
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert user_folder() == "/cache/hybrid_flax/compiled"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(compilation_cache.platform, "system", lambda: "Darwin")
    assert user_folder() == "/home/me/Library/Caches/hybrid_flax/compiled"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without a home
    assert user_folder() == OFF


def test_jax_s_own_folder_is_left_to_it(tmp_path):
    given = jax.config.jax_compilation_cache_dir
    with cached(None, str(tmp_path / "default")):
        assert jax.config.jax_compilation_cache_dir == given
    assert not (tmp_path / "default").exists()
    with cached(OFF, str(tmp_path / "default")):
        assert jax.config.jax_compilation_cache_dir is None
    assert jax.config.jax_compilation_cache_dir == given
    with (
        pytest.raises(InputError, match="--compilation_cache=: expected a folder for"),
        cached("", OFF),
    ):
        pass
    with pytest.raises(InputError, match="http://x.org/y: expected a folder in a bucket"):
        CompilationCache("http://x.org/y")
