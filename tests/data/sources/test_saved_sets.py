"""What the Hugging Face library writes beside its tables."""

import json

import pytest

from hybrid_flax.data.sources import open_source, tables
from hybrid_flax.data.sources.saved_sets import class_names
from tests.data.test_formats import look_through_here, table, write_arrow


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """Starting a process takes half a second."""
    monkeypatch.setattr(tables, "_look_through", look_through_here)


def opened(path, **options):
    return open_source("hugging_face", str(path), "train", **options)


def saved(folder, rows, **state):
    """A folder as `save_to_disk` leaves it."""
    write_arrow(folder / "data-00000-of-00001.arrow", rows)
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": "train"} | state
    (folder / "state.json").write_text(json.dumps(state))


def test_only_what_state_json_names_is_data(tmp_path):
    saved(tmp_path / "train", table(4))
    write_arrow(tmp_path / "train" / "cache-0123.arrow", table(4))
    write_arrow(tmp_path / "train" / "old.arrow", table(4))
    source = opened(tmp_path)
    assert len(source) == 4
    assert source.left_out["tables that state.json does not name"] == 1


def test_only_splits_that_dataset_dict_json_names_are_data(tmp_path):
    saved(tmp_path / "train", table(4))
    saved(tmp_path / "train_of_last_year", table(4))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert len(opened(tmp_path)) == 4


def test_a_dataset_that_was_saved_alone(tmp_path):
    saved(tmp_path / "one", table(4))
    assert len(opened(tmp_path / "one")) == 4
    assert len(opened(tmp_path / "one", train_split="train[:50%]")) == 2
    with pytest.raises(ValueError, match=r"one saved dataset, of the split 'train', not 'val'"):
        open_source("hugging_face", str(tmp_path / "one"), "val")
    for state, message in (
        ("5", "state.json is 5; expected a JSON object"),
        ('{"_split": "train"}', r"state.json: \"_data_files\" is None; expected a list"),
        ('{"_split": "train", "_data_files": [{"filename": "../a"}]}', r"_data_files.*\.\./a"),
        ('{"_split": "train", "_data_files": [{"filename": "a"}]}', "names a, which is not there"),
    ):
        (tmp_path / "one" / "state.json").write_text(state)
        with pytest.raises(ValueError, match=message):
            opened(tmp_path / "one")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "state.json",
            '{"_data_files": [{"filename": "gone.arrow"}]}',
            "state.json names gone.arrow, which is not there",
        ),
        ("state.json", '{"_data_files": ["a"]}', r"state.json: \"_data_files\" is \['a'\]"),
        (
            "state.json",
            '{"_data_files": [{"filename": "../a.arrow"}]}',
            r"\"_data_files\" is .*\.\./a.arrow",
        ),
        ("state.json", "[", "state.json"),
        ("dataset_info.json", '{"features": []}', r"dataset_info.json, features is \[\]"),
        ("dataset_info.json", "\xff", "dataset_info.json"),
        ("../dataset_dict.json", '{"splits": {"train": 1}}', r"dataset_dict.json: \"splits\" is"),
    ],
)
def test_odd_files_of_the_library_are_named(tmp_path, name, text, message):
    saved(tmp_path / "train", table(2, names=None))
    (tmp_path / "train" / name).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        opened(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{", "metadata huggingface"),
        ("[" * 100_000, "metadata huggingface"),
        ("\xff\xfe", "metadata huggingface"),
        ("5", "metadata huggingface is 5; expected a JSON object"),
        ('{"info": 5}', "info is 5"),
        ('{"info": {"features": ["label"]}}', "features is "),
        ('{"info": {"features": {"label": {"names": "ab"}}}}', "names of label are 'ab'"),
        (
            '{"info": {"features": {"label": {"names": ["a", 1]}}}}',
            r"names of label are \['a', 1\]",
        ),
        (
            '{"info": {"features": {"label": {"names": ["a", "a"]}}}}',
            "expected a list of different",
        ),
    ],
)
def test_odd_metadata_is_refused_by_file(metadata, message):
    with pytest.raises(ValueError, match=f"t.parquet, .*{message}"):
        class_names("t.parquet", "label", metadata)


@pytest.mark.parametrize(
    "metadata", ["{}", '{"info": {}}', '{"info": {"features": {"label": {"dtype": "int64"}}}}']
)
def test_labels_may_have_no_names(metadata):
    assert class_names("nowhere/t.parquet", "label", metadata) is None
