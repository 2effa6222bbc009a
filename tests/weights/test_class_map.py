"""Classifiers that are kept by the names of their classes."""

import numpy as np
import pytest

from hybrid_flax.models.unified.model import Unified
from hybrid_flax.weights.class_map import keep_named_classes

STRUCTURE = Unified.structure
THEIRS = {"params/head/bias": np.array([1.0, 2.0, 3.0]), "params/stem/bias": np.ones(3)}
OURS = {"params/head/bias": np.zeros(2), "params/stem/bias": np.zeros(3)}


def kept(theirs, ours):
    found = keep_named_classes(THEIRS, OURS, theirs, ours, STRUCTURE)
    assert found["params/stem/bias"] is THEIRS["params/stem/bias"]
    return found["params/head/bias"].tolist()


def test_rows_follow_the_names(capsys):
    assert kept(["a", "b", "c"], ["c", "a"]) == [3, 1]
    assert kept(["a", "b", "c"], ["new", "b"]) == [0, 2]
    assert "keeps 1 of 2 classes, by name; 1 begin fresh" in capsys.readouterr().out


def test_a_name_of_two_classes_is_none(capsys):
    assert kept(["crane", "crane", "c"], ["crane", "c"]) == [0, 3]
    assert "keeps 1 of 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    "names", [(None, ["a"]), (["a", "b", "c"], None), (["a", "b", "c"], ["x", "y"]), ("abc", "abc")]
)
def test_without_common_names_nothing_is_mapped(names, caplog):
    assert kept(*names) == [1, 2, 3]
    assert not caplog.text
