"""The index of tar files: believed only while it is whole and up to date."""

import os
import tarfile

import numpy as np
import pytest

from hybrid_flax.data.sources import open_source
from tests.data.test_formats import write_shard


@pytest.fixture
def shard(tmp_path):
    """A shard of ten samples."""
    file = tmp_path / "train-0.tar"
    members = [(f"{i}.jpg", bytes([i]) * 300) for i in range(10)]
    write_shard(file, members + [(f"{i}.cls", b"%d" % (i % 2)) for i in range(10)])
    return file


def opened(shard):
    return open_source("tar_shards", str(shard.parent), "train")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HYBRID_FLAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "indexes"


def test_a_damaged_index_is_made_anew(shard):
    want = opened(shard).labels.tolist()
    (index,) = shard.parent.glob(".tar_index*")
    whole = index.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(20):
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        index.write_bytes(data[: len(data) if rng.random() < 0.7 else rng.integers(len(data))])
        assert opened(shard).labels.tolist() == want
    index.write_text("nothing of the kind")
    assert opened(shard).labels.tolist() == want
    assert index.read_bytes()[:2] == b"PK"


def test_an_index_of_places_outside_the_shards_is_not_believed(shard):
    want = opened(shard).labels.tolist()
    (index,) = shard.parent.glob(".tar_index*")
    with np.load(index) as saved:
        columns = dict(saved)
    for name, value in (
        ("offset", 10**9),
        ("shard", 7),
        ("label", -1),
        ("size", -5),
        ("name_end", 0),
    ):
        np.savez(index, **columns | {name: np.full_like(columns[name], value)})
        assert opened(shard).labels.tolist() == want


def test_an_index_that_cannot_be_replaced_is_kept_in_the_cache(shard, cache, monkeypatch, capsys):
    opened(shard)
    (index,) = shard.parent.glob(".tar_index*")
    index.unlink()
    index.mkdir()  # as good as a file of somebody else: it can be neither read nor replaced
    assert len(opened(shard)) == 10
    assert [file.name for file in cache.iterdir()] == [index.name]
    monkeypatch.setattr(tarfile.TarInfo, "frombuf", None)  # a second time nothing is read through
    assert len(opened(shard)) == 10

    monkeypatch.undo()
    monkeypatch.setenv("HYBRID_FLAX_CACHE", "/proc/nowhere")
    assert len(opened(shard)) == 10
    assert "made anew each time" in capsys.readouterr().err


def test_nothing_is_written_through_a_link_in_the_place_of_the_index(shard, tmp_path):
    opened(shard)
    (index,) = shard.parent.glob(".tar_index*")
    target = tmp_path / "precious.txt"
    target.write_text("mine")
    index.unlink()
    index.symlink_to(target)
    opened(shard)
    assert target.read_text() == "mine"
    assert not index.is_symlink()


def test_others_may_read_the_index(shard):
    before = os.umask(0o022)
    try:
        opened(shard)
    finally:
        os.umask(before)
    (index,) = shard.parent.glob(".tar_index*")
    assert index.stat().st_mode & 0o777 == 0o644
