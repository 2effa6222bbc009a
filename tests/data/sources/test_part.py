import numpy as np
import pytest

from hybrid_flax.data.sources import Encoded, EncodedSource
from hybrid_flax.data.sources.digits import Digits
from hybrid_flax.data.sources.part import Renumbered, numbered_by, split_name
from hybrid_flax.errors import InputError


class Letters(EncodedSource):
    def __init__(self, names, labels, known=True):
        self.class_names, self.num_classes, self._labels = names, len(names or "abc"), labels
        self.labels = np.array(labels) if known else None

    def __len__(self):
        return len(self._labels)

    def read(self, index):
        return Encoded(b"", self._labels[index], f"{index}.png")


@pytest.mark.parametrize("known", [True, False])
def test_classes_are_numbered_by_name(known):
    source = Renumbered(Letters(["b", "a"], [0, 1, 1], known), ["a", "b", "c"])
    assert (source.num_classes, source.class_names) == (3, ["a", "b", "c"])
    assert [source.read(i).label for i in range(3)] == [1, 0, 0]
    assert (source.labels.tolist() if known else source.labels) == ([1, 0, 0] if known else None)


def test_sources_without_names_or_with_the_same_stay_as_they_are(caplog):
    for names in (["a", "b"], None):
        source = Letters(names, [0, 1])
        assert not caplog.text
        assert numbered_by(source, None) is source
        assert numbered_by(source, ["a", "b"]) is source
    assert "numbers without names: they are taken for those of the 2 classes" in caplog.text


def test_classes_that_are_not_known_are_named_if_they_have_images():
    assert numbered_by(Letters(["a", "b"], [0, 0]), ["a"]).labels.tolist() == [0, 0]
    for known in (True, False):
        with pytest.raises(InputError, match="1 of 2 classes, b, are not among the 2 .*: a, c"):
            numbered_by(Letters(["a", "b"], [0, 1], known), ["a", "c"])


def test_names_that_stand_for_several_classes_number_nothing():
    names = ["crane", "crane"]  # as in ImageNet: a bird and a machine
    assert numbered_by(Letters(names, [0, 1]), names).labels.tolist() == [0, 1]
    for theirs, given in ((names, ["crane", "heron"]), (["crane", "heron"], names)):
        with pytest.raises(InputError, match="told apart by name: crane stand for several"):
            numbered_by(Letters(theirs, [0, 1]), given)


@pytest.mark.parametrize(
    "text", ["train[%:]", "train[:101%]", f"train[:{'9' * 5000}]", "train[\u0663:]", "train[1]", ""]
)
def test_slices_that_are_none_are_refused(text):
    with pytest.raises(InputError, match="split .* is not understood; expected a name, or a part"):
        split_name(text)


def test_digits_have_two_splits_by_any_of_their_names():
    assert len(Digits("validation")) == len(Digits("test")) == 360
    assert len(Digits("training")) == 1437
    with pytest.raises(InputError, match="digits has no split 'extra'; it has train and val"):
        Digits("extra")
