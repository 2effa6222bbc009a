import re

import numpy as np
import pytest
from PIL import Image

from hybrid_flax import preview_data
from hybrid_flax.data.sources import Encoded, EncodedSource, open_source
from hybrid_flax.preview_data import _class_counts
from tests import tiny
from tests.data.test_sources import write_images


def test_a_folder_is_shown_counted_and_timed(tmp_path):
    for name, count in (("cat", 9), ("dog", 3)):
        write_images(tmp_path / "train" / name, count, size=(90, 60))
    write_images(tmp_path / "train" / "dog", 1, size=(20, 16), start=50)
    (tmp_path / "train" / "dog" / "broken.JPEG").write_text("broken")
    config = tiny.get_config(
        dataset__name="image_folder", dataset__path=str(tmp_path), dataset__on_unreadable="skip"
    )
    lines = preview_data.inspect(config, str(tmp_path / "out"), seconds=0.2)
    text = "\n".join(lines)
    assert "image_folder: 14 training images, 2 classes" in lines[0]
    assert lines[1] == "images per class: 5 to 9, median 7; fewest in dog, most in cat"
    assert "sizes of 13 images: width 20 to 90, median 90; height 16 to 60, median 60" in lines[2]
    assert "8% have a side below the model's 32 pixels" in lines[2]
    assert re.search(r"cannot read image .*broken.JPEG", lines[3])
    assert re.search(r"the loader: [\d,]+ images/s with 0 processes on \d+ cores", text)
    stages = re.search("one image in one process: (.*)", text)[1]
    assert [part.rpartition(" ")[0].rpartition(" ")[0] for part in stages.split(", ")] == [
        "read", "decode", "crop and resize", "augment", "batch and transfer",
    ]  # fmt: skip
    times = [float(time) for time in re.findall(r"([\d.]+) ms", stages)]
    assert min(times[:4]) > 0
    assert re.search(
        r"(read|decode|crop and resize|augment|batch and transfer) takes longest", text
    )
    with Image.open(tmp_path / "out" / "inspect.png") as picture:
        assert picture.size == (8 * 160, 2 * 174)
        pixels = np.asarray(picture)
    assert (pixels[160:174] < 128).any()  # captions
    assert (pixels[200:, 7 * 160 :] == 255).all()  # 14 images: two places stay empty


def test_classes_without_images_are_named():
    source = open_source("digits", "", "train")
    source.labels = np.array([0, 0, 0, 3, 3, 1])
    line = _class_counts(source, np.arange(6))
    assert line == (
        "images per class: 0 to 3, median 0; fewest in 2, most in 0; "
        "7 classes have none: 2, 4, 5, 6, 7, …"
    )


def test_labels_that_are_not_known_are_read_from_a_sample(monkeypatch):
    class Unlabelled(EncodedSource):
        num_classes = 4

        def __len__(self):
            return 1000

        def read(self, index):
            return Encoded(b"", index % 3, "")

    monkeypatch.setattr(preview_data, "_SAMPLE", 2)
    assert _class_counts(Unlabelled(), np.arange(1000)) == (
        "images per class in a sample of 40: 0 to 14, median 13; fewest in 3, most in 0; "
        "1 classes have none: 3"
    )


def test_a_picture_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write .*file/inspect.png"):
        preview_data.inspect(tiny.get_config(), str(tmp_path / "file"))


def test_no_picture_is_written_through_a_link(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "inspect.png").symlink_to(tmp_path / "mine")
    with pytest.raises(ValueError, match=r"cannot write .*inspect.png"):
        preview_data.inspect(tiny.get_config(), str(tmp_path))
    assert (tmp_path / "mine").read_text() == "mine"


def test_labels_beyond_the_classes_are_named():
    source = open_source("digits", "", "train")
    for wrong in (-1, 10):
        source.labels = np.array([0, wrong])
        with pytest.raises(ValueError, match=f"image number 1 has the label {wrong}"):
            _class_counts(source, np.arange(2))
