import json
import re

import numpy as np
import pytest
from PIL import Image

from hybrid_flax.errors import InputError
from hybrid_flax.evaluation import sets

SYNSETS = sets.synsets()
NUMBERS = {name: number for number, name in enumerate(SYNSETS)}


def image(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8)).save(file)


def test_the_thousand_synsets_are_in_the_order_of_the_classes():
    assert len(SYNSETS) == len(set(SYNSETS)) == 1000
    assert sorted(SYNSETS) == SYNSETS
    assert SYNSETS[0] == "n01440764"


def test_folders_of_v2_are_numbers_and_not_sorted_as_text(tmp_path):
    for number in (2, 10, 999):
        image(tmp_path / str(number) / "a.png")
    (part,) = sets.open_set("v2", str(tmp_path), NUMBERS).parts
    assert part.source.labels.tolist() == [2, 10, 999]
    assert part.accepted is None


def test_a_and_r_are_scored_among_their_own_classes(tmp_path, capsys):
    for synset in SYNSETS[5], SYNSETS[700]:
        image(tmp_path / synset / "a.png")
    found = sets.open_set("a", str(tmp_path), NUMBERS)
    assert found.classes.tolist() == [5, 700]
    assert "--set=a has 200 classes, here are 2" in capsys.readouterr().out
    val = tmp_path / "val"
    for synset in SYNSETS[4], SYNSETS[5]:
        image(val / synset / "b.png")
    clean = sets.restricted(sets.open_set("val", str(val), NUMBERS).parts[0], found.classes)
    assert clean.source.labels.tolist() == [5]


def test_real_has_its_labels_by_the_number_of_the_file(tmp_path):
    for number in (1, 2, 3):
        image(tmp_path / SYNSETS[number] / f"ILSVRC2012_val_{number:08}.JPEG")
    (tmp_path / "real.json").write_text(json.dumps([[7, 8], [], [9]]))
    (part,) = sets.open_set("real", str(tmp_path), NUMBERS).parts
    assert part.accepted == [(7, 8), (9,)]  # the second image has no label and does not count
    image(tmp_path / "other.png")
    with pytest.raises(InputError, match="1 of 4 images are not called ILSVRC2012_val_NNNNNNNN"):
        sets.open_set("real", str(tmp_path), NUMBERS)
    (tmp_path / "real.json").write_text("[1, 2]")
    with pytest.raises(InputError, match="real.json: expected real.json of github.com"):
        sets.open_set("real", str(tmp_path), NUMBERS)


def test_c_is_every_corruption_at_every_severity_below_groups_or_not(tmp_path):
    for place, corruption in enumerate(sets.ALEXNET):
        for severity in sets.SEVERITIES:
            folder = tmp_path / ("noise" if place < 3 else "") / corruption / severity
            image(folder / SYNSETS[1] / "a.png")
    found = sets.open_set("c", str(tmp_path), NUMBERS)
    assert found.is_cropped
    assert len(found.parts) == 75
    assert found.parts[0].name == "gaussian_noise/1"
    (tmp_path / "fog" / "3" / SYNSETS[1] / "a.png").unlink()
    (tmp_path / "fog" / "3" / SYNSETS[1]).rmdir()
    (tmp_path / "fog" / "3").rmdir()
    with pytest.raises(InputError, match="fog has no folder 3, of its severity"):
        sets.open_set("c", str(tmp_path), NUMBERS)


@pytest.mark.parametrize(
    ("name", "folders", "message"),
    [
        ("b", ["x"], "--set=b: expected one of val, real, v2, a, r, sketch, c"),
        ("v2", ["n01440764"], "has folders n01440764: --set=v2 expects folders 0 to 999"),
        ("sketch", ["0", "1"], "such as n01440764. Folders named by number are --set=v2's"),
        ("r", ["noise", "blur"], "Folders of corruptions are --set=c's"),
        ("val", ["n99999999"], "has 1 classes that the model has not: n99999999"),
        ("a", [], "has no folders: --set=a expects SYNSET/FILE"),
        ("c", ["fog"], "lacks 14 of the 15 corruptions: gaussian_noise, shot_noise"),
    ],
)
def test_a_set_in_another_layout_is_said(tmp_path, name, folders, message):
    for folder in folders:
        image(tmp_path / folder / "a.png")
    with pytest.raises(InputError, match=re.escape(message)):
        sets.open_set(name, str(tmp_path), NUMBERS)
    with pytest.raises(InputError, match="there is no such folder"):
        sets.open_set("val", str(tmp_path / "nothing"), NUMBERS)


def test_labels_are_numbers(tmp_path):
    image(tmp_path / SYNSETS[3] / "a.png")
    (part,) = sets.open_set("sketch", str(tmp_path), NUMBERS).parts
    assert part.source.labels.dtype == np.int64
    assert part.source[0][1] == 3
