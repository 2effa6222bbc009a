import re

import numpy as np
import pytest

from hybrid_flax.data.identity import (
    check_same_data,
    class_names,
    describe,
    fingerprint,
    has_no_names,
)
from hybrid_flax.data.sources import EncodedSource, open_source
from tests.data.test_sources import write_images


class Photos(EncodedSource):
    """A source of no bytes."""

    def __init__(self, labels, names=("cat", "dog"), files="0" * 16):
        self.labels = None if labels is None else np.array(labels)
        self.class_names, self.num_classes, self._files = names, 2, files

    def __len__(self):
        return 4 if self.labels is None else len(self.labels)

    def identity(self):
        return self._files


TRAIN, VAL = Photos([0, 1, 0, 1]), Photos([1, 0])


def test_a_checkpoint_keeps_class_names_and_both_splits():
    found = describe(TRAIN, VAL)
    assert (found["images"], found["classes"], found["class_names"]) == (4, 2, ["cat", "dog"])
    assert found["val"] == fingerprint(VAL)
    assert class_names({"data": found}) == ["cat", "dog"]
    assert class_names({}) is None
    assert not has_no_names({})
    nameless = describe(Photos(None, names=None), VAL)
    assert nameless["class_names"] is None
    assert has_no_names({"data": nameless})
    assert not {"names", "labels"} & nameless.keys()


@pytest.mark.parametrize(
    ("train", "val", "said"),
    [
        (Photos([0, 1]), VAL, "training images: 4 then, 2 now"),
        (Photos([0, 1, 1, 1]), VAL, "the labels of the training images are others"),
        (Photos([0, 1, 0, 1], files="1"), VAL, "names or sizes of the training files are others"),
        (TRAIN, Photos([1, 0], files="1"), "names or sizes of the validation files are others"),
        (TRAIN, Photos([1, 0, 1]), "validation images: 2 then, 3 now"),
        (
            Photos([0, 1, 0, 1], names=("dog", "pussycat")),
            VAL,
            "1 classes are gone: 'cat'; 1 classes are new: 'pussycat'",
        ),
        (
            Photos([0, 1, 0, 1], names=("dog", "cat")),
            VAL,
            "the classes are in another order: number 0 was 'cat', is 'dog'",
        ),
    ],
)
def test_other_data_are_refused(train, val, said):
    before = describe(TRAIN, VAL)
    check_same_data(describe(TRAIN, VAL), before, 7)
    with pytest.raises(
        ValueError, match=rf"checkpoint of step 7 \({re.escape(said)}\).*init_from="
    ):
        check_same_data(describe(train, val), before, 7)


def test_an_older_checkpoint_is_compared_by_what_it_has():
    now = describe(TRAIN, VAL)
    check_same_data(now, {}, 7)
    before = {name: now[name] for name in ("images", "classes", "labels")}
    check_same_data(now, before, 7)
    with pytest.raises(ValueError, match="labels of the training images"):
        check_same_data(now, before | {"labels": "other"}, 7)


def test_a_renamed_class_folder_is_other_data(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            write_images(tmp_path / split / name, 2)

    def described():
        return describe(*(open_source("image_folder", str(tmp_path), s) for s in ("train", "val")))

    before = described()
    check_same_data(described(), before, 7)
    for split in ("train", "val"):
        (tmp_path / split / "cat").rename(tmp_path / split / "pussycat")
    with pytest.raises(ValueError, match="classes are gone: 'cat'.*'pussycat'"):
        check_same_data(described(), before, 7)
