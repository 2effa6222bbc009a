import os

import pytest

from hybrid_flax.data.sources.shards import find_shards, find_split
from hybrid_flax.errors import InputError


def put(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def found(folder, split="train", ending=".tar"):
    files = find_shards("tar_shards", str(folder), split, (ending,))
    return [os.path.relpath(file, folder) for file in files]


def test_files_are_found_by_the_word_of_the_split(tmp_path):
    put(tmp_path, "train-0.tar", "a/Train/1.TAR", "trainer.tar", "x-train2-7.tar", "training/3.tar")
    put(tmp_path, "my_set_v2-0.tar", ".x-train-1.tar", "train-1.tar.part")
    assert found(tmp_path) == ["a/Train/1.TAR", "train-0.tar", "training/3.tar", "x-train2-7.tar"]
    assert found(tmp_path, "my_set_v2") == ["my_set_v2-0.tar"]
    left_out = find_split("tar_shards", str(tmp_path), "train", (".tar",)).left_out
    assert left_out == {"names that begin with a dot": 1, "other endings": 1}


def test_the_word_nearest_to_the_file_decides(tmp_path):
    put(tmp_path, "train/a-train-0.tar", "train/a-val-0.tar", "val/1.tar", "extra-val/train-2.tar")
    assert found(tmp_path) == ["extra-val/train-2.tar", "train/a-train-0.tar"]
    assert found(tmp_path, "val") == ["train/a-val-0.tar", "val/1.tar"]
    assert found(tmp_path, "extra") == ["extra-val/train-2.tar"]


def test_caches_beside_the_data_are_no_data(tmp_path):
    put(tmp_path, "train/data-0.arrow", "train/cache-0123.arrow", "train/tmpabc.arrow")
    assert found(tmp_path, ending=".arrow") == ["train/data-0.arrow"]


def test_a_split_that_is_not_found_says_what_lies_there(tmp_path):
    put(tmp_path, "train-0.tar", "holdout-0.tar", "val-0.tar.gz")
    with pytest.raises(
        InputError, match=r"has 2 .tar files, none for the split 'val' \(left out: 1 other endings"
    ):
        found(tmp_path, "val")
    with pytest.raises(InputError, match=r"lies holdout-0.tar, train-0.tar.*val_split=train\[90%:"):
        found(tmp_path, "val")


@pytest.mark.parametrize(
    "names",
    [
        ["train-0-of-2", "train-1-of-2"],
        ["train-00001-of-00002", "train-00002-of-00002"],  # counted from 1
        ["a-train-0-of-1", "b-train-0-of-2", "b-train-1-of-2"],
        ["train/x-0-of-2", "val/x-1-of-2"],  # a split that was made of some files
        ["train-0-of-2-0123456789abcdef", "train-1-of-2-fedcba9876543210"],  # checksums
        ["train-1-of-1"],
    ],
)
def test_whole_sets(tmp_path, names):
    put(tmp_path, *(f"{name}.tar" for name in names))
    assert found(tmp_path) == [f"{name}.tar" for name in names if "val" not in name]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["train-0-of-3", "train-2-of-3"],
            r"1 of 3 files train-\*-of-\*.tar are missing: number 1\.",
        ),
        (["train-2-of-2"], "1 of 2 files .* missing: number 1"),
        (["train-7-of-999999999999"], "999999999998 of 999999999999 .* number 0, 1, 2, …. Get"),
        (["train-0-of-2", "train-1-of-2", "train-0-of-1"], "of several sets, of 1 and of 2"),
    ],
)
def test_a_set_that_says_it_has_so_many_files_has_them(tmp_path, names, message):
    put(tmp_path, *(f"{name}.tar" for name in names))
    with pytest.raises(InputError, match=message):
        found(tmp_path)


def test_where_a_state_file_says_what_is_data_names_are_not_asked(tmp_path):
    put(tmp_path, "train/data-0-of-1.arrow", "train/data-1-of-2.arrow", "train/state.json")
    assert len(found(tmp_path, ending=".arrow")) == 2
