"""Both splits of a dataset, and the classes of the model."""

import numpy as np
import pytest

from hybrid_flax.build import open_splits, prepare
from tests import tiny
from tests.data.test_sources import write_images


def folders(root, train, val):
    for split, names in (("train", train), ("val", val)):
        for name in names:
            write_images(root / split / name, 2)
    return tiny.settings(dataset__name="image_folder", dataset__path=str(root))


def lists(root, train, val):
    for split, labels in (("train", train), ("val", val)):
        write_images(root / split, len(labels))
        (root / "meta").mkdir(exist_ok=True)
        lines = [f"{i:04}.JPEG {label}\n" for i, label in enumerate(labels)]
        (root / "meta" / f"{split}.txt").write_text("".join(lines))
    return tiny.settings(dataset__name="list_files", dataset__path=str(root))


def test_the_training_split_numbers_the_classes_of_both(tmp_path):
    config, train, val = open_splits(folders(tmp_path, "abc", "ac"))
    assert config.model.num_classes == 3
    assert list(train.class_names) == list(val.class_names) == ["a", "b", "c"]
    np.testing.assert_array_equal(val.labels, [0, 0, 2, 2])


def test_recorded_names_number_a_split(tmp_path):
    config = folders(tmp_path, "", "ac")
    (_, source, _, model) = prepare(config, "val", ["c", "b", "a"])
    np.testing.assert_array_equal(source.labels, [2, 2, 0, 0])
    assert model.head.bias.shape == (3,)
    with pytest.raises(ValueError, match="c"):
        prepare(config, "val", ["a", "b"])


def test_validation_labels_beyond_the_model_are_refused(tmp_path):
    config = lists(tmp_path, [0, 1, 2, 3, 4], [10, 14])
    with pytest.raises(ValueError) as error:
        open_splits(config)
    assert str(error.value).startswith(
        "the split 'val' of dataset list_files has labels up to 14, but the model has 5 classes, "
        "0 to 4. Correct the labels"
    )
    assert "--config.model.num_classes=15" in str(error.value)
