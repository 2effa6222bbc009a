"""TFDS's folders as people have them: damaged, incomplete, with other features, in many files."""

import io
import json
import os
import pathlib
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from hybrid_flax.data.images import UnreadableImageError
from hybrid_flax.data.sources import open_source


def write_dataset(folder, name, features, shards=4):
    """A dataset of eight pictures in array_record files, without TensorFlow."""
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module

    data = folder / name / "1.0.0"
    data.mkdir(parents=True)
    identity = tfds.core.DatasetIdentity(
        name=name, version=tfds.core.Version("1.0.0"), data_dir=str(data), module_name=__name__
    )
    features = tfds.features.FeaturesDict(features)
    info = tfds.core.DatasetInfo(builder=identity, features=features)
    info.set_file_format("array_record", override=True)
    template = tfds.core.ShardedFileTemplate(
        data_dir=data, dataset_name=name, split="train", filetype_suffix="array_record"
    )
    for number, file in enumerate(template.sharded_filepaths(num_shards=shards)):
        writer = array_record_module.ArrayRecordWriter(os.fspath(file), "group_size:1")
        for i in range(8 // shards):
            picture = io.BytesIO()
            Image.new("RGB", (4, 4), (10 * number + i, 0, 0)).save(picture, "PNG")
            values = {
                key: picture.getvalue() if isinstance(kind, tfds.features.Image) else i % 2
                for key, kind in features.items()
            }
            writer.write(features.serialize_example(values))
        writer.close()
    split = tfds.core.SplitInfo(
        name="train", shard_lengths=[8 // shards] * shards, num_bytes=1, filename_template=template
    )
    info.set_splits(tfds.core.SplitDict([split]))
    info.write_to_directory(data)
    return data


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("tfds")
    photo = tfds.features.Image(shape=(None, None, 3), encoding_format="png")
    coarse, fine = (tfds.features.ClassLabel(names=names) for names in (["a", "b"], ["x", "y"]))
    write_dataset(folder, "usual", {"image": photo, "label": fine})
    write_dataset(folder, "other", {"photo": photo, "kind": fine})
    write_dataset(folder, "two", {"image": photo, "coarse": coarse, "fine": fine})
    write_dataset(folder, "none", {"image": photo, "label": tfds.features.Scalar(np.int64)})
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "data")
    return tmp_path / "data"


def opened(name, folder, **options):
    return open_source(name, str(folder), "train", **options)


def test_features_named_otherwise_are_found_or_chosen(whole):
    source = opened("other", whole)
    assert (len(source), source.class_names, source.read(1).label) == (8, ["x", "y"], 1)
    with pytest.raises(
        ValueError, match=r"no feature 'label' .*coarse \(ClassLabel\).*label_column"
    ):
        opened("two", whole)
    assert opened("two", whole, label_column="coarse").class_names == ["a", "b"]
    with pytest.raises(
        ValueError, match=r"no feature 'label' of the kind ClassLabel, only .*Scalar"
    ):
        opened("none", whole)
    with pytest.raises(ValueError, match=r"no feature 'photo' of the kind Image.*image_column"):
        opened("two", whole, image_column="photo", label_column="fine")


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "5", '{"splits": 7}', "\xff"])
def test_damaged_descriptions_are_named(folder, file, text):
    (folder / "usual" / "1.0.0" / file).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"dataset '?usual"):
        opened("usual", folder)


def test_missing_files_are_counted(folder):
    files = sorted((folder / "usual" / "1.0.0").glob("*array_record*"))
    files[2].unlink()
    with pytest.raises(ValueError, match=rf"1 of 4 files are not there, such as .*{files[2].name}"):
        opened("usual", folder)
    assert len(opened("usual", folder, train_split="train[:50%]")) == 4  # needs the first two


def test_damaged_records_are_unreadable_images(folder):
    files = sorted((folder / "usual" / "1.0.0").glob("*array_record*"))
    data = bytearray(files[0].read_bytes())
    place = data.index(b"PNG")
    data[place] ^= 1
    files[0].write_bytes(data)
    os.truncate(files[1], len(data) // 2)
    source = opened("usual", folder)
    for index in (0, 2, 3):
        with pytest.raises(
            UnreadableImageError, match=rf"cannot read image usual/train\[{index}\]"
        ):
            source.read(index)
    assert source.read(4).label == 0


def test_few_files_are_open_at_a_time(whole, monkeypatch):
    monkeypatch.setattr("hybrid_flax.data.sources.tfds.FILES_AT_ONCE", 2)
    source = pickle.loads(pickle.dumps(opened("usual", whole)))
    before = records_open()
    for index in (0, 2, 4, 6, 1, 3, 5, 7):
        assert source.read(index).data[:4] == b"\x89PNG"
        assert records_open() <= before + 2


def records_open():
    files = [os.path.realpath(link) for link in pathlib.Path("/proc/self/fd").iterdir()]
    return sum("array_record" in file for file in files)


def test_identity_stays_when_a_dataset_moves_and_changes_with_its_files(folder, tmp_path):
    first = opened("usual", folder).identity()
    assert len(first) == 16
    folder.rename(tmp_path / "moved")
    assert opened("usual", tmp_path / "moved").identity() == first
    file = next((tmp_path / "moved" / "usual" / "1.0.0").glob("*array_record*"))
    file.write_bytes(file.read_bytes() + b"\0")
    assert opened("usual", tmp_path / "moved").identity() != first
    assert opened("usual", tmp_path / "moved", train_split="train[:4]").identity() != first


def test_other_json_beside_is_no_matter(folder):
    (folder / "usual" / "1.0.0" / "notes.json").write_text(json.dumps([1]))
    assert len(opened("usual", folder)) == 8
