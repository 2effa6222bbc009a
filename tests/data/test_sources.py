import io

import numpy as np
import pytest
from PIL import Image

from hybrid_flax.data.images import rgb
from hybrid_flax.data.sources import open_source


def write_images(folder, count, size=(20, 16), start=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        Image.new("RGB", size, (i, 2 * i, 3 * i)).save(folder / f"{i:04}.JPEG")


@pytest.fixture
def folder(tmp_path):
    for split, count in (("train", 3), ("val", 2)):
        write_images(tmp_path / split / "n01_cat", count)
        write_images(tmp_path / split / "n02_dog", count + 1, start=10)
    return tmp_path


def test_digits_are_split_once_and_for_all():
    train, val = (open_source("digits", "", split) for split in ("train", "val"))
    assert (len(train), len(val), train.num_classes) == (1437, 360, 10)
    photo, label = train[0]
    assert (photo.size, rgb(photo).mode, label) == ((8, 8), "RGB", 6)
    from sklearn.datasets import load_digits

    together = np.concatenate([[np.asarray(s[i][0]) for i in range(len(s))] for s in (train, val)])
    together = together.reshape(1797, -1)
    everything = np.round(load_digits().images * (255 / 16)).astype(np.uint8).reshape(1797, -1)
    assert sorted(map(bytes, together)) == sorted(map(bytes, everything))


def test_image_folder_numbers_classes_by_name(folder):
    train, val = (open_source("image_folder", str(folder), split) for split in ("train", "val"))
    assert (len(train), len(val), train.num_classes, val.num_classes) == (7, 5, 2, 2)
    assert [train[i][1] for i in range(7)] == [0, 0, 0, 1, 1, 1, 1]
    assert train[0][0].size == (20, 16)


def test_images_deeper_down_and_in_other_formats_count(folder):
    write_images(folder / "train" / "n01_cat" / "more", 1)
    Image.new("L", (5, 5)).save(folder / "train" / "n01_cat" / "grey.PNG")
    (folder / "train" / "n01_cat" / "README.txt").write_text("not an image")
    source = open_source("image_folder", str(folder), "train")
    assert len(source) == 9
    assert {rgb(source[i][0]).mode for i in range(9)} == {"RGB"}


def test_evaluating_needs_no_training_images(tmp_path):
    write_images(tmp_path / "val" / "a", 1)
    write_images(tmp_path / "val" / "b", 1)
    assert open_source("image_folder", str(tmp_path), "val").num_classes == 2


def test_an_unreadable_image_is_named(folder):
    bad = folder / "train" / "n01_cat" / "0001.JPEG"
    bad.write_text("hello")
    source = open_source("image_folder", str(folder), "train")
    with pytest.raises(ValueError, match=r"cannot read image .*n01_cat/0001.JPEG \(5 bytes\)"):
        source[1]
    bad.unlink()
    with pytest.raises(ValueError, match=r"0001.JPEG: .*No such file"):
        source[1]


def test_empty_class_folders_are_all_named(folder):
    (folder / "train" / "n03_eel").mkdir()
    (folder / "train" / "n04_fox").mkdir()
    with pytest.raises(ValueError, match=r"without images: .*n03_eel, .*n04_fox\. Add images"):
        open_source("image_folder", str(folder), "train")


def test_missing_folders_say_what_is_expected_and_offer_digits(tmp_path, folder):
    with pytest.raises(ValueError, match=r"--config.dataset.path=DIR.*dataset.name=digits"):
        open_source("image_folder", "", "train")
    with pytest.raises(ValueError, match=r"no folder .*/nowhere/train.*dataset.name=digits"):
        open_source("image_folder", str(tmp_path / "nowhere"), "train")
    (tmp_path / "flat" / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match="has no class folders; expected .*/CLASS"):
        open_source("image_folder", str(tmp_path / "flat"), "train")


def test_validation_classes_that_training_lacks_are_named(folder):
    write_images(folder / "val" / "n09_owl", 1)
    with pytest.raises(ValueError, match="classes that .*/train has not: n09_owl"):
        open_source("image_folder", str(folder), "val")


# ----------------------------------------------------------------------------------------- TFDS


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A small TFDS dataset on disk, prepared as any other, without TensorFlow."""
    import tensorflow_datasets as tfds
    from etils import epath

    folder = epath.Path(tmp_path_factory.mktemp("tfds"))

    class TinyPhotos(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path, code_path = folder, folder / "tiny_photos.py"  # not in this package

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="png"),
                "label": tfds.features.ClassLabel(num_classes=3),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, _):
            return {
                "train": self._generate_examples(6),
                "validation": self._generate_examples(4),
            }

        def _generate_examples(self, count):
            for i in range(count):
                file = io.BytesIO()
                Image.new("RGB", (9, 7), (10 * i, 0, 0)).save(file, "PNG")
                file.seek(0)
                yield i, {"image": file, "label": i % 3}

    TinyPhotos(data_dir=folder, file_format="array_record").download_and_prepare()
    return str(folder)


def test_tfds_datasets_are_read_without_tensorflow(tfds_folder):
    import sys

    train, val = (open_source("tiny_photos", tfds_folder, split) for split in ("train", "val"))
    assert (len(train), len(val), train.num_classes) == (6, 4, 3)
    pairs = sorted(
        (rgb(photo).getpixel((0, 0))[0], label) for photo, label in (train[i] for i in range(6))
    )
    assert pairs == [(0, 0), (10, 1), (20, 2), (30, 0), (40, 1), (50, 2)]
    assert "tensorflow" not in sys.modules


def test_data_that_is_not_prepared_says_how_to_and_offers_digits(tmp_path):
    with pytest.raises(ValueError, match="imagenet2012 is not prepared in") as error:
        open_source("imagenet2012", str(tmp_path), "train")
    text = str(error.value)
    assert "python -m hybrid_flax.data.prepare_imagenet --train_tar=ILSVRC2012_img_train" in text
    assert f"--out={tmp_path}" in text
    assert "--config.dataset.name=image_folder" in text
    assert "--config.dataset.name=digits" in text
    with pytest.raises(ValueError, match="cifar10 is not prepared in") as error:
        open_source("cifar10", str(tmp_path), "train")
    assert f"tfds build cifar10 --file_format=array_record --data_dir={tmp_path}" in str(
        error.value
    )


def test_splits_of_tfds_datasets(tfds_folder):
    def images(split):
        return len(open_source("tiny_photos", tfds_folder, "train", train_split=split))

    assert [images(split) for split in ("train[:50%]", "train[50%:]", "validation")] == [3, 3, 4]
    with pytest.raises(ValueError, match="tiny_photos has no split extra; it has train, val"):
        images("extra")
    for split in ("train[:0]", "train[x]"):
        with pytest.raises(ValueError, match="tiny_photos has no images in the split 'train"):
            images(split)


def test_unknown_datasets_get_a_suggestion():
    with pytest.raises(ValueError, match=r"unknown dataset 'cifar1O'.* Did you mean cifar10"):
        open_source("cifar1O", "", "train")
    with pytest.raises(ValueError, match=r"unknown dataset 'digit'.* Did you mean digits"):
        open_source("digit", "", "train")
