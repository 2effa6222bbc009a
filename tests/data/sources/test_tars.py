"""Tar shards as people have them: damaged, packed otherwise, in thousands; and their index."""

import contextlib
import io
import json
import os
import pickle
import resource
import subprocess
import tarfile

import numpy as np
import pytest
from PIL import Image

from hybrid_flax.data.images import UnreadableImageError
from hybrid_flax.data.sources import open_source
from hybrid_flax.data.sources.descriptors import Descriptors
from hybrid_flax.data.sources.tar_members import members
from hybrid_flax.errors import InputError
from tests.data.test_formats import content, jpeg, write_shard

PAIR = 2048  # bytes of an image of up to 512 bytes, and of its label, in a tar file


def samples(count):
    for i in range(count):
        yield f"{i}.jpg", bytes([i]) * 300
        yield f"{i}.cls", b"%d" % (i % 2)


@pytest.fixture
def shard(tmp_path):
    """A shard of ten samples."""
    file = tmp_path / "train-0.tar"
    write_shard(file, samples(10))
    return file


def opened(shard, **options):
    return open_source("tar_shards", str(shard.parent), "train", **options)


def labels_of(shard, *members, **options):
    write_shard(shard, members)
    return opened(shard, **options).labels.tolist()


# ------------------------------------------------------------------------------------- damage


def flipped(data, byte):
    return data[:byte] + bytes([data[byte] ^ 0x40]) + data[byte + 1 :]


HALF = 5 * PAIR
DAMAGE = {
    "a bit of a header": (lambda d: flipped(d, HALF + 10), HALF, "header .* is damaged", 9),
    "a bit of a size": (lambda d: flipped(d, HALF + 130), HALF, "header .* is damaged", 9),
    "zeros to the end": (lambda d: d[:HALF] + bytes(len(d) - HALF), HALF, "20480 zeros, more", 5),
    "zeros in between": (
        lambda d: d[:HALF] + bytes(PAIR) + d[HALF + PAIR :], HALF, "2048 zeros, and then", 9,
    ),
    "cut": (lambda d: d[:HALF], HALF, "ends without the zeros", 5),
    "cut in a header": (lambda d: d[: HALF + 100], HALF, "ends within the header", 5),
    "cut in an image": (
        lambda d: d[: HALF + 700], HALF, "5.jpg .* 300 bytes, and the file ends after 188", 5,
    ),
    "two joined": (lambda d: d + flipped(d, 2 * PAIR), 10 * PAIR, "several tar files", 0),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_told_with_its_place_or_what_is_lost_is_counted(shard, damage):
    change, place, reason, left = DAMAGE[damage]
    shard.write_bytes(change(shard.read_bytes()))
    with pytest.raises(ValueError, match=rf"train-0.tar is damaged at byte {place}: .*{reason}"):
        opened(shard)
    if left:
        source = opened(shard, skip_damaged=True)
        assert len(source) == left
        assert source.left_out["damaged places of tar files"] == 1
        assert all(set(source.read(i).data) <= {0, *range(10)} for i in range(left))
    assert not [file for file in os.listdir(shard.parent) if ".tmp" in file]


def test_a_file_that_is_no_tar_file_is_refused_even_if_damage_may_be_skipped(shard):
    for data in (b"<html>not found</html>", os.urandom(5000), b"\x1f\x8b\x08 and more", b""):
        shard.write_bytes(data)
        with pytest.raises(ValueError, match="train-0.tar"):
            opened(shard, skip_damaged=True)


def lies(whole, rng):
    """A tar file with changed bytes in a header: sizes below zero, without end, other types."""
    data = bytearray(whole)
    block = 512 * int(rng.integers(len(data) // 512))
    for _ in range(rng.integers(1, 4)):
        data[block + int(rng.integers(512))] = int(rng.integers(256))
    if rng.random() < 0.7:  # a checksum that fits, as an attacker writes it
        checksum = sum(data[block : block + 512]) - sum(data[block + 148 : block + 156]) + 256
        data[block + 148 : block + 156] = b"%06o\0 " % checksum
    return bytes(data)


@pytest.mark.parametrize("count", [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_headers_that_lie_are_read_or_refused(shard, count):
    rng = np.random.default_rng(0)
    whole = shard.read_bytes()
    refused = 0
    for number in range(count):
        shard.write_bytes(lies(whole, rng))
        os.utime(shard, (number, number))
        try:
            source = opened(shard, skip_damaged=number % 3 == 0)
            assert all(source.read(i).name for i in range(len(source)))
        except InputError as error:
            refused += "train-0.tar" in str(error)
    assert count / 4 < refused < count


def test_headers_that_only_announce_others_take_no_stack():
    file = io.BytesIO()
    for kind in b"xLKg" * 1000:
        header = tarfile.TarInfo("many")
        header.type = bytes([kind])
        file.write(header.tobuf())
    told = []
    assert not list(members(file, 0, file.tell(), lambda *damage: told.append(damage)))
    assert len(told) == 1


# ------------------------------------------------------------------- members of another kind


def test_a_sparse_member_is_refused_by_name(tmp_path):
    (tmp_path / "src").mkdir()
    with open(tmp_path / "src" / "b.bmp", "wb") as stream:
        stream.truncate(1 << 20)
        stream.seek(1 << 19)
        stream.write(b"x")
    (tmp_path / "src" / "b.cls").write_text("0")
    shard = tmp_path / "train-0.tar"
    for form in ("gnu", "posix"):
        command = ["tar", f"--format={form}", "-S", "-cf", shard, "-C", tmp_path / "src", "b.bmp"]
        subprocess.run([*command, "b.cls"], check=True)
        with pytest.raises(ValueError, match=r"train-0.tar: b.bmp is stored as a sparse file"):
            opened(shard)


def test_links_are_read_where_they_lead_to(shard):
    def link(name, target, kind):
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        return member

    with tarfile.open(shard, "w") as archive:
        for name, data in (("./a/0.jpg", jpeg(50)), ("./a/0.cls", b"1")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        archive.addfile(link("b/1.jpg", "./a/0.jpg", tarfile.LNKTYPE))
        archive.addfile(link("b/1.cls", "../a/0.cls", tarfile.SYMTYPE))
    assert content(opened(shard)) == [(50, 1), (50, 1)]
    assert opened(shard).name(1).endswith("train-0.tar:b/1.jpg")
    with tarfile.open(shard, "a") as archive:
        archive.addfile(link("c/2.jpg", "c/3.jpg", tarfile.SYMTYPE))
    with pytest.raises(ValueError, match=r"c/2.jpg is a symbolic link to c/3.jpg, which is not in"):
        opened(shard)


def test_names_that_begin_with_a_dot_are_left_out_and_other_endings_counted(shard):
    labels = labels_of(
        shard, ("._0.jpg", b"x"), *samples(2), ("0.txt", b"a"), ("__MACOSX/0.jpg", b"x"),
        ("9.cls", b"7"),
    )  # fmt: skip
    assert labels == [0, 1]
    assert opened(shard).left_out == {
        "names that begin with a dot": 2, "other endings": 1, "class numbers without an image": 1,
    }  # fmt: skip


def test_long_and_odd_names(shard):
    long = "folder/" * 40
    names = [f"{long}0", "ünï/1", "bad\udcff/2"]
    with tarfile.open(shard, "w", format=tarfile.GNU_FORMAT) as archive:
        for name in names:
            for ending, data in ((".jpg", jpeg(0)), (".cls", b"0")):
                member = tarfile.TarInfo(name + ending)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    source = opened(shard)
    assert [source.name(i).partition(":")[2] for i in range(3)] == [
        f"{long}0.jpg", "ünï/1.jpg", r"bad\xff/2.jpg",
    ]  # fmt: skip


def test_compressed_tar_files_are_named(tmp_path):
    with tarfile.open(tmp_path / "train-0.tar.gz", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("0.jpg"))
    with pytest.raises(ValueError, match=r"train-0.tar.gz is compressed, as are all 1 tar files"):
        open_source("tar_shards", str(tmp_path), "train")


# ------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("name", "text", "label"),
    [
        ("0.cls", "007\n", 7),
        ("0.cls", "\ufeff3\r\n", 3),
        ("0.class", "4", 4),
        ("0.json", '{"label": "3"}', 3),
        ("0.json", '{"class_id": 3.0}', 3),
        ("0.json", "5", 5),
    ],
)
def test_labels_written_otherwise_are_read(shard, name, text, label):
    assert labels_of(shard, ("0.jpg", b"x"), (name, text.encode())) == [label]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("0.cls", "n01440764", "0: 0.cls.*n01440764"),
        ("0.cls", "9" * 30, "0.cls.*999"),
        ("0.cls", "9" * 17, "0.jpg has the label 99999999999999999"),
        ("0.cls", "", "0.cls"),
        ("0.json", '["label"]', "0.json.*label"),
        ("0.json", "null", "0.json.*None"),
        ("0.json", '{"label": [3]}', r"0.json, field label.*\[3\]"),
        ("0.json", '{"label": true}', "0.json, field label.*True"),
        ("0.json", "[" * 200_000, "0.json"),
        ("0.json", '{"label": ' + "9" * 9000 + "}", "0.json"),
        ("0.json", '{"caption": "x"}', "0.jpg has no class number.*Beside it: 0.json"),
        ("0.txt", "7", "0.jpg has no class number; expected 0.cls.*label_column.*Beside it: 0.txt"),
    ],
)
def test_labels_that_are_none_are_quoted_with_shard_and_member(shard, name, text, message):
    message = message.removeprefix("0: ")
    with pytest.raises(ValueError, match=rf"(?s)train.*{message}") as error:
        labels_of(shard, ("0.jpg", b"x"), (name, text.encode()))
    assert len(str(error.value)) < 600


def test_long_json_beside_a_class_number_is_no_matter(shard):
    long = json.dumps({"embedding": [0.5] * 400_000}).encode()
    assert labels_of(shard, ("0.jpg", b"x"), ("0.json", long), ("0.cls", b"3")) == [3]
    with pytest.raises(ValueError, match=r"0.jpg has no class number.*Beside it: 0.json"):
        labels_of(shard, ("0.jpg", b"x"), ("0.json", long), ("1.cls", b"3"))
    with pytest.raises(ValueError, match=r"0.cls has 2000000 bytes, and is to hold a class number"):
        labels_of(shard, ("0.jpg", b"x"), ("0.cls", b"3" * 2_000_000))


def test_parts_named_otherwise_are_chosen(shard):
    sample = [
        ("0.left.png", b"l"),
        ("0.right.png", b"r"),
        ("0.txt", b"5"),
        ("0.json", b'{"kind": 2}'),
    ]
    with pytest.raises(ValueError, match=r"belong to one sample.*--config.dataset.image_column="):
        labels_of(shard, *sample)
    assert labels_of(shard, *sample, image_column="left.png", label_column="txt") == [5]
    source = opened(shard, image_column="right.png", label_column="kind")
    assert (source.labels.tolist(), source.read(0).data) == ([2], b"r")
    with pytest.raises(ValueError, match=r"expected 0.number, or 0.json with a field number"):
        opened(shard, image_column="left.png", label_column="number")
    with pytest.raises(ValueError, match=r"no images .*left out: 3 other endings"):
        opened(shard, image_column="webp", label_column="x")
    with pytest.raises(ValueError, match=r"image_column=left.png.*digits has no columns"):
        open_source("digits", "", "train", image_column="left.png")


# --------------------------------------------------------------------------- descriptors


def test_few_files_are_open_at_a_time(tmp_path):
    for i in range(30):
        write_shard(tmp_path / f"train-{i:02}.tar", [("0.jpg", jpeg(i)), ("0.cls", b"0")])
    source = pickle.loads(pickle.dumps(open_source("tar_shards", str(tmp_path), "train")))
    pool = Descriptors(4)
    before = len(os.listdir("/proc/self/fd"))
    for i in range(30):
        place = [int(source._table[name][i]) for name in ("offset", "size")]
        assert pool.read(source._shards[i], *place, source._sizes[i]) == jpeg(i)
        assert len(os.listdir("/proc/self/fd")) <= before + 4
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2, limits[1]))
    held = []
    try:
        with contextlib.suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(ValueError, match=r"Too many open files.*ulimit -n") as error:
            Descriptors(4).read(source._shards[0], 0, 1, source._sizes[0])
        assert not isinstance(error.value, UnreadableImageError)
        assert len(pool.read(source._shards[3], 0, 9, source._sizes[3])) == 9  # it makes room
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in held:
            os.close(descriptor)
        pool.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_identity_stays_when_a_dataset_moves_and_changes_with_its_images(tmp_path):
    write_shard(tmp_path / "a" / "train-0.tar", samples(3))
    first = open_source("tar_shards", str(tmp_path / "a"), "train").identity()
    assert len(first) == 16
    (tmp_path / "a").rename(tmp_path / "b")
    assert open_source("tar_shards", str(tmp_path / "b"), "train").identity() == first
    write_shard(tmp_path / "b" / "train-0.tar", [("0.jpg", b"other"), *list(samples(3))[1:]])
    assert open_source("tar_shards", str(tmp_path / "b"), "train").identity() != first


def test_an_image_of_another_format_is_still_an_image(shard):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (90, 0, 0)).save(file, "BMP")
    write_shard(shard, [("0.BMP", file.getvalue()), ("0.json", json.dumps({"label": 0}).encode())])
    assert content(opened(shard)) == [(90, 0)]
