"""List files, tar shards, Hugging Face tables, parts of splits, files kept in memory."""

import concurrent.futures
import io
import json
import multiprocessing.shared_memory
import os
import pickle
import tarfile

import pytest
from PIL import Image

from hybrid_flax.data.images import UnreadableImageError, rgb
from hybrid_flax.data.sources import (
    Encoded,
    EncodedSource,
    Source,
    open_source,
    table_scan,
    tables,
)
from hybrid_flax.data.sources.memory import InMemory
from tests.data.test_sources import write_images


def jpeg(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 8), (value, 0, 0)).save(file, "JPEG")
    return file.getvalue()


def content(source):
    """(brightness, label) of every image, as a copy in another process would give it."""
    source = pickle.loads(pickle.dumps(source))
    pairs = [source[i] for i in range(len(source))]
    return [(round(rgb(photo).getpixel((0, 0))[0], -1), label) for photo, label in pairs]


# ----------------------------------------------------------------------------------- list files


@pytest.fixture
def lists(tmp_path):
    (tmp_path / "meta").mkdir()
    for split, count in (("train", 4), ("val", 2)):
        lines = []
        for i in range(count):
            file = tmp_path / split / f"some folder{i % 2}" / f"{i}.JPEG"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(jpeg(10 * i))
            lines.append(f"{file.relative_to(tmp_path / split)} {i}\n")
        (tmp_path / "meta" / f"{split}.txt").write_text("".join(lines))
    return tmp_path


def test_lists_say_which_images_and_classes_there_are(lists):
    train, val = (open_source("list_files", str(lists), split) for split in ("train", "val"))
    assert content(train) == [(0, 0), (10, 1), (20, 2), (30, 3)]
    assert content(val) == [(0, 0), (10, 1)]
    assert (train.num_classes, val.num_classes) == (4, 4)  # the larger of the two lists


def test_a_list_that_names_missing_images_is_refused_with_their_lines(lists):
    (lists / "train" / "some folder1" / "3.JPEG").unlink()
    with pytest.raises(ValueError, match=r"names 1 of 4 images .* not there: line 4: .*3.JPEG"):
        open_source("list_files", str(lists), "train")


@pytest.mark.parametrize("line", ["a.JPEG", "a.JPEG -1", "a.JPEG cat", "a.JPEG 1.5"])
def test_a_line_that_is_not_understood_is_quoted(lists, line):
    (lists / "meta" / "train.txt").write_text(f"some folder0/0.JPEG 0\n{line}\n")
    with pytest.raises(ValueError, match=r"train.txt, line 2: .*expected .relative path, blank"):
        open_source("list_files", str(lists), "train")


def test_missing_and_empty_lists_are_named(lists):
    (lists / "meta" / "val.txt").write_text("")
    with pytest.raises(ValueError, match="val.txt is empty: there are no images in this split"):
        open_source("list_files", str(lists), "val")
    with pytest.raises(ValueError, match=r"no list .*meta/extra.txt.*dataset.name=digits"):
        open_source("list_files", str(lists), "train", train_split="extra")


# ----------------------------------------------------------------------------------- tar shards


def write_shard(file, samples):
    """samples: [(member name, bytes)]"""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for name, data in samples:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path):
    write_shard(
        tmp_path / "photos-train-0000.tar",
        [("a/0.jpg", jpeg(0)), ("a/0.cls", b"0"), ("a/1.cls", b"3\n"), ("a/1.jpg", jpeg(10))],
    )
    write_shard(
        tmp_path / "photos-train-0001.tar",
        [("2.json", json.dumps({"label": 1, "caption": "x"}).encode()), ("2.jpg", jpeg(20))],
    )
    write_shard(tmp_path / "photos-validation-0000.tar", [("0.jpeg", jpeg(30)), ("0.label", b"1")])
    return tmp_path


def test_tar_shards_are_read_at_random_by_an_index_made_once(shards, monkeypatch):
    train, val = (open_source("tar_shards", str(shards), split) for split in ("train", "val"))
    assert content(train) == [(0, 0), (10, 3), (20, 1)]
    assert content(val) == [(30, 1)]
    assert (train.num_classes, val.num_classes) == (4, 4)
    assert train.read(2).name == f"{shards}/photos-train-0001.tar:2.jpg"
    assert len(list(shards.glob(".tar_index_train_*.npz"))) == 1

    monkeypatch.setattr(tarfile, "open", None)  # a second time nothing is read through
    assert content(open_source("tar_shards", str(shards), "train")) == content(train)


def test_the_index_follows_a_shard_that_changed(shards):
    open_source("tar_shards", str(shards), "train")
    write_shard(shards / "photos-train-0001.tar", [("9.jpg", jpeg(90)), ("9.cls", b"2")])
    os.utime(shards / "photos-train-0001.tar", (1, 1))
    assert content(open_source("tar_shards", str(shards), "train"))[-1] == (90, 2)


def test_the_index_can_lie_elsewhere(shards, tmp_path_factory):
    index = tmp_path_factory.mktemp("index") / "deeper"
    open_source("tar_shards", str(shards), "train", index=str(index))
    assert len(list(index.iterdir())) == 1
    assert not list(shards.glob(".tar_index*"))
    with pytest.raises(ValueError, match=r"cannot keep the index .*--config.dataset.index=DIR"):
        open_source("tar_shards", str(shards), "train", index="/proc/nowhere")


def test_shards_that_cannot_be_used_are_named(shards, tmp_path):
    bad = shards / "photos-train-0002.tar"
    write_shard(bad, [("5.jpg", jpeg(0)), ("5.txt", b"a caption")])
    with pytest.raises(ValueError, match=r"0002.tar: image 5.jpg has no class number; expected"):
        open_source("tar_shards", str(shards), "train")
    with tarfile.open(bad, "w:gz") as archive:
        archive.add(shards / "photos-train-0000.tar")
    with pytest.raises(ValueError, match=r"0002.tar as a tar file: it is compressed \(gzip\)"):
        open_source("tar_shards", str(shards), "train")
    with pytest.raises(ValueError, match=r"has 4 .tar files, none for the split 'extra'"):
        open_source("tar_shards", str(shards), "train", train_split="extra")


def test_a_shard_that_is_cut_off_later_gives_unreadable_images(shards):
    source = open_source("tar_shards", str(shards), "train")
    (shards / "photos-train-0001.tar").write_bytes(b"")
    with pytest.raises(
        UnreadableImageError, match=r"0001.tar:2.jpg: the file has 0 bytes, and had \d+"
    ):
        source[2]


# ------------------------------------------------------------------------------ Parquet and Arrow


def table(count, start=0, label="label", names=("cat", "dog", "eel")):
    import pyarrow as pa

    images = [{"bytes": jpeg(10 * i), "path": f"{i}.jpg"} for i in range(start, start + count)]
    rows = pa.table({"image": images, label: [i % 3 for i in range(start, start + count)]})
    if not names:
        return rows
    features = {"image": {"_type": "Image"}, label: {"names": list(names), "_type": "ClassLabel"}}
    return rows.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )


def write_arrow(file, rows, batch=2):
    import pyarrow as pa

    file.parent.mkdir(parents=True, exist_ok=True)
    with pa.ipc.new_stream(str(file), rows.schema) as writer:
        writer.write_table(rows, max_chunksize=batch)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_hugging_face_tables_are_read_at_random(tmp_path, kind):
    import pyarrow.parquet as pq

    for shard, start in enumerate((0, 5)):
        if kind == "parquet":
            (tmp_path / "data").mkdir(exist_ok=True)
            file = tmp_path / "data" / f"train-0000{shard}-of-00002.parquet"
            pq.write_table(table(5, start), file, row_group_size=2)
        else:
            file = tmp_path / "train" / f"data-0000{shard}-of-00002.arrow"
            write_arrow(file, table(5, start))
    source = open_source("hugging_face", str(tmp_path), "train")
    assert content(source) == [(10 * i, i % 3) for i in range(10)]
    assert source.class_names == ["cat", "dog", "eel"]
    assert source.num_classes == 3
    assert source.read(8).name == f"{file}, row 3"
    assert [source.read(i).data for i in (9, 0, 6)] == [jpeg(90), jpeg(0), jpeg(60)]


def test_names_of_classes_beside_arrow_files(tmp_path):
    write_arrow(tmp_path / "test" / "data-00000-of-00001.arrow", table(2, names=None))
    features = {"label": {"names": ["a", "b", "c", "d"], "_type": "ClassLabel"}}
    (tmp_path / "test" / "dataset_info.json").write_text(json.dumps({"features": features}))
    source = open_source("hugging_face", str(tmp_path), "val")  # "test" serves where there is none
    assert (len(source), source.num_classes) == (2, 4)


def look_through_here(files, image, label):
    """As `tables._look_through`, but without a process, which takes half a second."""
    for file in files:
        yield json.loads(json.dumps(table_scan.scan(file, image, label)))


def test_tables_that_cannot_be_used_say_why(tmp_path, monkeypatch):
    import pyarrow as pa

    monkeypatch.setattr(tables, "_look_through", look_through_here)

    def refused(rows, message):
        write_arrow(tmp_path / "train.arrow", rows)
        with pytest.raises(ValueError, match=message):
            open_source("hugging_face", str(tmp_path), "train")

    refused(table(4, names=("cat", "dog")), "image number 2 has the label 2, and 1 of 4 labels are")
    refused(
        table(4, label="caption"),
        r"no column is named label or .*only image \(struct.*, caption \(int64\)",
    )
    refused(table(4).drop_columns("image"), "one image column.*found none among the columns label")
    refused(table(2).slice(2), "the split 'train' of .* has no rows")
    unlabelled = table(2, names=None).set_column(1, "label", pa.array([-1, -1]))
    refused(unlabelled, "image number 0 has the label -1.*Splits without labels cannot be used")
    words = table(2, names=None).set_column(1, "label", pa.array(["cat", "dog"]))
    refused(words, "train.arrow, column label: the label is 'cat'; expected a class number")
    (tmp_path / "train.arrow").write_text("no table")
    with pytest.raises(ValueError, match="cannot read .*train.arrow as an Arrow file"):
        open_source("hugging_face", str(tmp_path), "train")


def test_images_that_are_not_in_the_table_are_named(tmp_path):
    import pyarrow as pa

    rows = [{"bytes": None, "path": "/elsewhere/0.jpg"}, None, {"bytes": jpeg(0), "path": ""}]
    images = pa.array(rows, table(1)["image"].type)
    write_arrow(tmp_path / "train.arrow", pa.table({"image": images, "label": [0, 1, 1]}))
    source = open_source("hugging_face", str(tmp_path), "train")
    with pytest.raises(UnreadableImageError, match="row 0: its bytes are not in the file"):
        source[0]
    with pytest.raises(UnreadableImageError, match="train.arrow, row 1: its bytes are not in"):
        source[1]
    write_arrow(tmp_path / "train.arrow", pa.table({"image": images[:2], "label": [0, 1]}))
    with pytest.raises(ValueError, match="column image has no images, only paths to them"):
        open_source("hugging_face", str(tmp_path), "train")


# ------------------------------------------------------------------------------ parts and memory


def test_parts_of_a_split_share_out_its_images(tmp_path):
    for name, start in (("a", 0), ("b", 10)):
        write_images(tmp_path / "all" / name, 10, start=start)
    splits = {"train_split": "all[:75%]", "val_split": "all[75%:]"}
    train, val = (
        open_source("image_folder", str(tmp_path), split, **splits) for split in ("train", "val")
    )
    assert (len(train), len(val), train.num_classes, val.num_classes) == (15, 5, 2, 2)
    assert sorted(content(train) + content(val)) == sorted(
        content(open_source("image_folder", str(tmp_path), "train", train_split="all"))
    )
    assert set(val.labels) == {0, 1}  # not the last class alone
    assert len(open_source("image_folder", str(tmp_path), "train", train_split="all[:3]")) == 3


def test_parts_that_are_empty_or_not_understood(tmp_path):
    write_images(tmp_path / "all" / "a", 4)
    for split, message in (
        ("all[4:]", r"the split 'all\[4:\]' is empty: there are 4 images in all"),
        ("all[1:2:3]", r"'all\[1:2:3\]' is not understood; expected a name, or a part"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source("image_folder", str(tmp_path), "train", train_split=split)


def test_files_in_memory_are_read_once_and_shared(tmp_path):
    write_images(tmp_path / "train" / "a", 3)
    write_images(tmp_path / "train" / "b", 3, start=3)
    (tmp_path / "train" / "b" / "0004.JPEG").write_text("broken")
    plain = open_source("image_folder", str(tmp_path), "train")
    source = open_source("image_folder", str(tmp_path), "train", cache=True)
    want = [plain.read(i) for i in range(6)]
    for file in (tmp_path / "train").rglob("*.JPEG"):
        file.unlink()
    assert [source.read(i) for i in range(6)] == want
    assert len(pickle.dumps(source)) < 2000  # it names the memory, and holds no images
    with pytest.raises(UnreadableImageError, match="0004.JPEG"):
        source[4]


def test_memory_is_seen_by_worker_processes_and_freed_at_the_end(tmp_path):
    write_images(tmp_path / "train" / "a", 2)
    source = open_source("image_folder", str(tmp_path), "train", cache=True)
    want, name = source.read(1), source._memory.name
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(source.read, 1).result() == want
    assert source.read(1) == want
    del source
    with pytest.raises(FileNotFoundError):
        multiprocessing.shared_memory.SharedMemory(name)


def test_too_little_memory_is_said_at_once(tmp_path, monkeypatch):
    write_images(tmp_path / "train" / "a", 2)
    monkeypatch.setattr("hybrid_flax.data.sources.memory._shared_memory_left", lambda: 100)
    with pytest.raises(ValueError, match="the first 1 of 2 images .* more than the 0.00 GB"):
        open_source("image_folder", str(tmp_path), "train", cache=True)


def test_an_unreadable_image_whose_label_is_not_known_is_refused_when_it_is_asked_for():
    class Unlabelled(EncodedSource):
        num_classes = 2

        def __len__(self):
            return 2

        def read(self, index):
            if index == 0:
                raise UnreadableImageError(f"cannot read image {index}")
            return Encoded(b"data", 1, "1.png")

    kept = InMemory(Unlabelled())
    assert (len(kept), kept.labels, kept.read(1)) == (2, None, (b"data", 1, "1.png"))
    with pytest.raises(UnreadableImageError, match="cannot read image 0"):
        kept.read(0)


@pytest.mark.parametrize("options", [{}, {"train_split": "train[:50]"}, {"cache": True}])
def test_every_source_has_what_the_protocol_declares(options):
    source = open_source("digits", "", "train", **options)
    declared = {name for name in vars(Source) if name[0] != "_"}
    assert declared == {"num_classes", "class_names", "labels", "name", "identity"}
    assert all(hasattr(source, name) for name in declared)
    assert len(source.labels) == len(source)
