import gzip
import io
import json
import sys
import tarfile

import pytest

from hybrid_flax.data import prepare_imagenet
from hybrid_flax.data.images import rgb
from hybrid_flax.data.prepare_imagenet import Split, prepare
from hybrid_flax.data.sources import open_source
from tests.data.test_formats import jpeg, write_shard

SMALL = (Split("train", 6, 3), Split("validation", 4, 2))
WNIDS = ("n01440764", "n01443537")  # classes 0 and 1


def tar_of(samples) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in samples:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


@pytest.fixture
def tars(tmp_path, monkeypatch):
    """The two files as they are, but small; image i of a class has the red value 10·i + class."""
    classes = [
        (f"{wnid}.tar", tar_of((f"{wnid}_{i}.JPEG", jpeg(40 * i + 100 * c)) for i in range(3)))
        for c, wnid in enumerate(WNIDS)
    ]
    write_shard(tmp_path / "train.tar", classes)
    names = [f"ILSVRC2012_val_0000000{i}.JPEG" for i in (3, 1, 2, 4)]  # not sorted in the file
    write_shard(tmp_path / "val.tar", [(name, jpeg(10 * int(name[-6]))) for name in names])
    labels = [WNIDS[i % 2] for i in range(4)]  # in the order of the names
    monkeypatch.setattr(prepare_imagenet, "_validation_labels", lambda: labels)
    return {"train": str(tmp_path / "train.tar"), "validation": str(tmp_path / "val.tar")}


def content(out, split):
    source = open_source("imagenet2012", str(out), split)
    pairs = (source[i] for i in range(len(source)))
    return sorted((round(rgb(photo).getpixel((0, 0))[0], -1), label) for photo, label in pairs)


TRAIN = [(0, 0), (40, 0), (80, 0), (100, 1), (140, 1), (180, 1)]
VALIDATION = [(10, 0), (20, 1), (30, 0), (40, 1)]


def test_two_tar_files_become_what_tfds_reads(tars, tmp_path):
    folder = prepare(tars, str(tmp_path / "out"), SMALL, num_classes=2)
    assert content(tmp_path / "out", "train") == TRAIN
    assert content(tmp_path / "out", "val") == VALIDATION
    assert open_source("imagenet2012", str(tmp_path / "out"), "val").num_classes == 1000
    assert sorted(path.name for path in folder.glob("*record*")) == [
        *(f"imagenet2012-train.array_record-0000{i}-of-00003" for i in range(3)),
        *(f"imagenet2012-validation.array_record-0000{i}-of-00002" for i in range(2)),
    ]
    info = json.loads((folder / "dataset_info.json").read_text())
    assert info["fileFormat"] == "array_record"
    assert [split["shardLengths"] for split in info["splits"]] == [["2", "2", "2"], ["2", "2"]]
    assert not (folder / "unfinished").exists()
    assert "tensorflow" not in sys.modules

    import tensorflow_datasets as tfds

    example = tfds.data_source("imagenet2012", data_dir=str(tmp_path / "out"), split="train")[0]
    assert example["image"].shape == (8, 12, 3)
    assert example["file_name"].decode().partition("_")[0] == WNIDS[example["label"]]


def test_a_stopped_preparation_goes_on_where_it_was(tars, tmp_path, monkeypatch):
    original = prepare_imagenet._write_shard
    written = []

    def stops(file, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(file.name)
        original(file, *rest)

    monkeypatch.setattr(prepare_imagenet, "_write_shard", stops)
    with pytest.raises(KeyboardInterrupt):
        prepare(tars, str(tmp_path / "out"), SMALL, num_classes=2)
    with pytest.raises(ValueError, match="imagenet2012 is not prepared"):
        open_source("imagenet2012", str(tmp_path / "out"), "train")

    monkeypatch.setattr(tarfile, "open", None)  # nor does it look through the tar files again
    monkeypatch.setattr(
        prepare_imagenet, "_write_shard", lambda *a: (written.append(a[0].name), original(*a))
    )
    prepare(tars, str(tmp_path / "out"), SMALL, num_classes=2)
    assert len(written) == len(set(written)) == 5
    assert content(tmp_path / "out", "train") == TRAIN


def test_one_split_can_be_added_to_the_other(tars, tmp_path):
    prepare({"validation": tars["validation"]}, str(tmp_path / "out"), SMALL, num_classes=2)
    assert content(tmp_path / "out", "val") == VALIDATION
    prepare({"train": tars["train"]}, str(tmp_path / "out"), SMALL, num_classes=2)
    assert content(tmp_path / "out", "train") == TRAIN
    assert content(tmp_path / "out", "val") == VALIDATION


def test_tar_files_that_are_not_whole_or_not_imagenet_are_refused(tars, tmp_path, capsys):
    def refused(message, splits=SMALL, **changed):
        with pytest.raises(ValueError, match=message):
            prepare(tars | changed, str(tmp_path / "out"), splits, num_classes=2)

    refused("train.tar has 6 images, expected 1,281,167: is the download complete", (
        Split("train", 1_281_167, 1024),))  # fmt: skip
    refused("there is no file /nowhere.tar", train="/nowhere.tar")
    whole = (tmp_path / "train.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    refused(r"cut.tar.*is the download complete\?|Is the download complete\?",
            train=str(tmp_path / "cut.tar"))  # fmt: skip
    (tmp_path / "text.tar").write_text("not a tar file")
    refused("cannot read .*text.tar: .*Is the download complete", train=str(tmp_path / "text.tar"))
    write_shard(tmp_path / "pets.tar", [("pets.tar", tar_of((str(i), b"") for i in range(6)))])
    refused("classes that ImageNet-1k has not: pets", train=str(tmp_path / "pets.tar"))
    write_shard(
        tmp_path / "one.tar", [(f"{WNIDS[0]}.tar", tar_of((str(i), b"") for i in range(6)))]
    )
    refused("one.tar has images of 1 classes, expected 2", train=str(tmp_path / "one.tar"))
    assert prepare_imagenet.main([f"--out={tmp_path}"]) == 2
    assert "give --train_tar, --val_tar or both" in capsys.readouterr().err


def test_files_of_another_tar_file_are_not_mixed_in(tars, tmp_path, monkeypatch):
    def writes_one(file, *_):
        file.touch()
        raise ZeroDivisionError

    monkeypatch.setattr(prepare_imagenet, "_write_shard", writes_one)
    with pytest.raises(ZeroDivisionError):
        prepare(tars, str(tmp_path / "out"), SMALL, num_classes=2)
    with open(tars["train"], "ab") as stream:
        stream.write(b"\0" * 512)
    with pytest.raises(ValueError, match="has files from another .*train.tar than this"):
        prepare(tars, str(tmp_path / "out"), SMALL, num_classes=2)


def test_too_little_space_is_said_before_writing(tars, tmp_path, monkeypatch):
    usage = prepare_imagenet.shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(prepare_imagenet.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ValueError, match=r"needs 0\.0 GB more, and has 0\.0 GB free. Choose"):
        prepare(tars, str(tmp_path / "out"), SMALL, num_classes=2)


def test_the_validation_labels_are_those_that_tfds_brings():
    labels = prepare_imagenet._validation_labels()
    assert len(labels) == 50_000
    assert {labels.count(wnid) for wnid in sorted(set(labels))[:20]} == {50}
    assert len(set(labels)) == 1000


def test_damage_in_a_tar_file_is_told_with_its_place(tars, tmp_path):
    whole = bytearray((tmp_path / "train.tar").read_bytes())
    second = whole.index(b"n01443537.tar")
    place = whole.index(b"n01443537_1.JPEG")
    for byte, what in ((second, "header of a member"), (place, "header of a member")):
        damaged = bytearray(whole)
        damaged[byte + 3] ^= 4
        (tmp_path / "bad.tar").write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"bad.tar: it is damaged at byte {byte}: the {what}"):
            prepare(tars | {"train": str(tmp_path / "bad.tar")}, str(tmp_path / "out"), SMALL, 2)


def test_a_compressed_tar_file_is_not_called_damaged(tars, tmp_path):
    packed = gzip.compress((tmp_path / "train.tar").read_bytes())
    (tmp_path / "train.tar").write_bytes(packed)
    with pytest.raises(ValueError, match=r"train.tar: it is compressed \(gzip\).*Unpack it"):
        list(prepare_imagenet._members(str(tmp_path / "train.tar"), "train"))


def test_an_image_that_is_there_twice_is_refused(tars, tmp_path):
    names = [f"ILSVRC2012_val_0000000{i}.JPEG" for i in (1, 2, 2, 4)]
    write_shard(tmp_path / "val.tar", [(name, jpeg(0)) for name in names])
    with pytest.raises(ValueError, match="has 1 images twice, such as ILSVRC2012_val_00000002"):
        prepare(tars, str(tmp_path / "out"), SMALL, num_classes=2)


def test_what_others_put_beside_unfinished_files_stays(tars, tmp_path):
    unfinished = tmp_path / "out" / "imagenet2012" / "5.1.0" / "unfinished"
    unfinished.mkdir(parents=True)
    (unfinished / "notes.txt").write_text("mine")
    (unfinished / "train.npz").write_text("damaged")  # made anew
    prepare(tars, str(tmp_path / "out"), SMALL, num_classes=2)
    assert [file.name for file in unfinished.iterdir()] == ["notes.txt"]
    assert content(tmp_path / "out", "train") == TRAIN
