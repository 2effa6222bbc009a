import contextlib
import os
import pickle
import random
import shutil

import pytest

from hybrid_flax.data.images import UnreadableImageError
from hybrid_flax.data.sources import describe_files, open_source
from hybrid_flax.data.sources.files import ListFiles
from hybrid_flax.errors import InputError
from tests.data.test_sources import write_images


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "val"):
        for number, name in enumerate(("ant", "bee", "cow")):
            write_images(tmp_path / split / name, 2, start=number)
    return tmp_path


def opened(folder, split="train", **options):
    return open_source("image_folder", str(folder), split, **options)


# ------------------------------------------------------------------------------ image folders


def test_what_is_no_image_is_left_out_and_said(folder):
    for name in (".thumbnails", ".ipynb_checkpoints", "ant/.ipynb_checkpoints", "__MACOSX"):
        write_images(folder / "train" / name, 1)
    (folder / "train/ant/._0000.JPEG").write_bytes(bytes(100))
    (folder / "train/ant/notes.txt").write_text("")
    (folder / "train/README").write_text("")
    os.mkfifo(folder / "train/cow/zz.png")
    source = opened(folder)
    assert (len(source), source.class_names) == (6, ["ant", "bee", "cow"])
    assert describe_files(source) == (
        f"6 images of {folder}/train; left out: "
        "4 names that begin with a dot (train/.ipynb_checkpoints …), "
        "1 caches and leftovers of programs (train/__MACOSX), "
        "1 files outside of class folders (train/README), "
        "1 other endings (train/ant/notes.txt), "
        "1 not regular files (train/cow/zz.png)"
    )


def test_linked_folders_in_classes_are_images_of_the_class(folder):
    write_images(folder / "elsewhere", 4)
    (folder / "train/ant/more").symlink_to(folder / "elsewhere")
    (folder / "train/dog").symlink_to(folder / "elsewhere")
    (folder / "train/ant/up").symlink_to("..")
    source = opened(folder)
    assert source.class_names == ["ant", "bee", "cow", "dog"]
    assert [int((source.labels == label).sum()) for label in range(4)] == [14, 2, 2, 4]


def test_a_pipe_that_comes_later_is_not_opened(folder):
    source = opened(folder)
    os.remove(source.name(0))
    os.mkfifo(source.name(0))
    with pytest.raises(UnreadableImageError, match="cannot read image .*0000.JPEG: a named pipe"):
        source[0]


def test_classes_without_images_say_what_lies_there(folder):
    (folder / "train/dog").mkdir()
    (folder / "train/dog/1.avif").write_bytes(b"")
    (folder / "train/dog/2.avif").write_bytes(b"")
    with pytest.raises(InputError, match=r"train/dog \(left out there: 2 other endings \(dog/1.av"):
        opened(folder)


@pytest.mark.parametrize("name", ["validation", "valid", "dev", "VAL", "test"])
def test_the_folder_of_a_split_may_have_its_other_names(folder, name):
    os.rename(folder / "val", folder / name)
    os.rename(folder / "train", folder / "Training")
    source = opened(folder, "val")
    assert (len(source), source.found_in) == (6, f"{folder}/{name}")
    assert len(opened(folder)) == 6


def test_a_folder_that_is_not_found_says_what_lies_there_and_how_to_name_it(folder):
    os.rename(folder / "val", folder / "holdout")
    with pytest.raises(
        InputError, match=r"no folder .*/val\..*lies holdout, train.*val_split=NAME"
    ):
        opened(folder, "val")
    with pytest.raises(InputError, match=r"train_split=train\[:90%\] .*val_split=train\[90%:\]"):
        opened(folder, "val")
    assert len(opened(folder, "val", val_split="holdout")) == 6
    shutil.copytree(folder / "holdout", folder / "valid")
    shutil.copytree(folder / "holdout", folder / "validation")
    with pytest.raises(InputError, match="several that may be the split 'val': valid, validation"):
        opened(folder, "val")


def test_classes_that_val_lacks_keep_the_numbers_of_train(folder):
    shutil.rmtree(folder / "val/bee")
    val = opened(folder, "val")
    assert (val.num_classes, sorted(set(val.labels))) == (3, [0, 2])
    assert "1 of 3 classes without images" in describe_files(val)


def test_val_alone_is_numbered_by_given_names(folder):
    shutil.rmtree(folder / "val/bee")
    shutil.rmtree(folder / "train")
    val = opened(folder, "val")
    assert (val.num_classes, sorted(set(val.labels))) == (2, [0, 1])
    for options in ({}, {"cache": True}, {"val_split": "val[:2]"}):
        val = opened(folder, "val", classes=["ant", "bee", "cow"], **options)
        names = [val.name(i).split("/")[-2] for i in range(len(val))]
        assert val.num_classes == 3
        assert [val.class_names[label] for label in val.labels] == names
        assert [val.read(i).label for i in range(len(val))] == list(val.labels)
    with pytest.raises(InputError, match=r"1 of 2 classes, cow, are not among the 2 .* ant, bee"):
        opened(folder, "val", classes=["ant", "bee"])


def test_given_names_count_also_beside_other_training_folders(folder):
    shutil.rmtree(folder / "train/cow")
    with pytest.raises(InputError, match=r"val has 1 of 3 classes that .*train has not: cow"):
        opened(folder, "val")
    assert opened(folder, "val", classes=["cow", "bee", "ant"]).labels.tolist() == [
        2,
        2,
        1,
        1,
        0,
        0,
    ]


def test_class_folders_must_have_names_in_utf8(folder):
    os.mkdir(os.fsencode(folder / "train") + b"/caf\xe9")
    with pytest.raises(InputError, match=r"class folder 'caf\\udce9' has no name in UTF-8"):
        opened(folder)


def test_left_out_names_in_any_encoding_can_be_printed(folder):
    with open(os.fsencode(folder / "train/ant") + b"/caf\xe9\n.txt", "w"):
        pass
    assert "1 other endings (train/ant/caf??.txt)" in describe_files(opened(folder))


# ----------------------------------------------------------------------------------- identity


def test_identity_follows_names_and_sizes_and_not_the_place(folder, tmp_path_factory):
    before = opened(folder).identity()
    assert len(before) == 16
    assert int(before, 16) >= 0
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "data"
    shutil.copytree(folder, elsewhere)
    source = opened(elsewhere)
    assert source.identity() == before == pickle.loads(pickle.dumps(source)).identity()
    assert opened(elsewhere, cache=True).identity() == before
    assert opened(elsewhere, train_split="train[:50%]").identity() != before
    os.rename(elsewhere / "train/bee", elsewhere / "train/bat")
    renamed = opened(elsewhere).identity()
    assert renamed != before
    write_images(elsewhere / "train/bat", 1, size=(90, 90), start=1)
    assert opened(elsewhere).identity() not in (before, renamed)


# -------------------------------------------------------------------------------------- lists


@pytest.fixture
def lists(tmp_path):
    (tmp_path / "meta").mkdir()
    for split in ("train", "val"):
        write_images(tmp_path / split, 3)
        lines = [f"{i:04}.JPEG {i}\n" for i in range(3)]
        (tmp_path / "meta" / f"{split}.txt").write_text("".join(lines))
    return tmp_path


def listed(folder, split="train", **options):
    return open_source("list_files", str(folder), split, **options)


def test_lists_have_marks_line_ends_and_blanks_of_any_kind(lists):
    text = "\ufeff0000.JPEG 0\r\n\r\n0001.JPEG\t 007 \r\n0002.JPEG 2.0"
    (lists / "meta/train.txt").write_bytes(text.encode())
    assert listed(lists).labels.tolist() == [0, 7, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("0000.JPEG 0\n\xe4.JPEG 1\n".encode("latin-1"), "train.txt, line 2: .* is not UTF-8"),
        (b"0000.JPEG 0\n0001.JPEG cat\n", r"line 2: the label is 'cat'; expected a class number"),
        (b"0000.JPEG,0\n", "line 1: '0000.JPEG,0' is not understood; expected .relative path, bl"),
        (
            b"0000.JPEG 0\n0001.JPEG 1000000000000\n",
            "line 2, 0001.JPEG, has the label 1000000000000",
        ),
        (b"0000.JPEG 0\n0001.JPEG " + b"9" * 9999, "line 2: .* at most 18 digits"),
        (b"0000.JPEG 0\n0000.JPEG 1\n", "line 2: 0000.JPEG is of class 1, and .* above of class 0"),
        (
            b"0000.JPEG 0\n./0000.JPEG 1\n",
            "line 2: ./0000.JPEG is of class 1, and .* above of class 0",
        ),
        (b"0000.JPEG 0\n\n0004.JPEG 1\n", "names 1 of 2 images that are not there: line 3: .*0004"),
    ],
)
def test_lists_are_refused_by_line(lists, content, message):
    (lists / "meta/train.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        listed(lists)


def test_only_regular_files_can_be_listed(lists):
    os.remove(lists / "train/0001.JPEG")
    os.mkfifo(lists / "train/0001.JPEG")
    with pytest.raises(InputError, match=r"line 2: .*0001.JPEG \(no regular file\)"):
        listed(lists)
    os.remove(lists / "meta/train.txt")
    os.mkfifo(lists / "meta/train.txt")
    with pytest.raises(InputError, match="train.txt: a named pipe"):
        listed(lists)


def test_lists_and_folders_may_have_the_other_names_of_splits(lists):
    os.rename(lists / "meta/val.txt", lists / "meta/validation.txt")
    os.rename(lists / "val", lists / "valid")
    source = listed(lists, "val")
    assert (len(source), source.found_in) == (3, f"{lists}/meta/validation.txt")
    os.rename(lists / "meta/validation.txt", lists / "meta/holdout.txt")
    with pytest.raises(
        InputError, match=r"no list .*/val.txt.*There lies holdout, train.*val_split="
    ):
        listed(lists, "val")


def test_validation_labels_beyond_the_training_labels_can_be_seen(lists):
    (lists / "meta/val.txt").write_text("0000.JPEG 12\n")
    assert (listed(lists).num_classes, listed(lists, "val").num_classes) == (3, 13)


def test_damaged_lists_are_read_or_refused(lists):
    rng = random.Random(0)
    whole = (lists / "meta/train.txt").read_bytes()
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.choice(b"\0\n\r\t 09-.\xff\xc3aJ/")
        (lists / "meta/train.txt").write_bytes(data)
        with contextlib.suppress(InputError):
            ListFiles(str(lists), "train")
