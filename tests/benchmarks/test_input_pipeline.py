"""The benchmark of the loader: its files, what it is compared with, what it refuses."""

import itertools
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from benchmarks import input_pipeline, input_pipeline_torch

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    input_pipeline.make_photos(folder, 70)
    return folder


def test_files_have_imagenets_sizes_and_bytes(photos):
    files = list(photos.glob("train/class*/*.JPEG"))
    sizes = []
    for file in files:
        with Image.open(file) as photo:
            sizes.append(photo.size)
            assert photo.layer[0][1:3] == photo.layer[1][1:3]  # colours at full resolution
    assert len(files) == 70
    assert np.mean(sizes, 0) == pytest.approx((469, 387), rel=0.15)
    assert np.mean([file.stat().st_size for file in files]) == pytest.approx(110e3, rel=0.2)


def test_both_sides_give_batches_of_the_same_form(photos):
    mine = input_pipeline.ours(photos, 0)
    batch = next(mine)["image"]
    mine.close()
    files = [str(file) for file in photos.rglob("*.JPEG")]
    others = input_pipeline_torch.Photos(files, list(range(70)), 224)
    theirs, labels = input_pipeline_torch._collate([others[i] for i in range(3)])
    assert (batch.shape, batch.dtype) == ((64, 224, 224, 3), np.uint8)
    assert (theirs.shape, str(theirs.dtype)) == ((3, 3, 224, 224), "torch.uint8")
    assert labels.tolist() == [0, 1, 2]
    assert len(input_pipeline_torch.OPERATIONS) == 15
    photo = Image.open(files[0]).convert("RGB").resize((16, 16))
    for name in input_pipeline_torch.OPERATIONS:
        assert input_pipeline_torch._augment(photo, name).size == (16, 16)


def test_processor_time_is_that_of_the_work():
    batches = itertools.repeat(None)

    def start():
        yield from (sum(range(200_000)) for _ in batches)

    by_processor, by_clock = input_pipeline.images_per_second(start, 40)
    assert by_clock <= 1.2 * by_processor


def test_what_cannot_be_measured_is_said(capsys):
    for arguments, message in (
        (["--cores=4096"], "--cores=4096: there are"),
        (["--images=5"], "--images=5: a batch alone has 64"),
        (["--save=/nowhere/x.json"], "there is no folder /nowhere"),
    ):
        assert input_pipeline.main(arguments) == 2
        assert message in capsys.readouterr().err


def test_the_readme_has_the_figures_that_were_measured():
    result = json.loads((ROOT / "benchmarks" / "results" / "input_pipeline_cpu.json").read_text())
    median = {name: f"{speed:.0f}" for name, speed in result["median"].items()}
    readme = (ROOT / "README.md").read_text()
    assert (
        f"{median['exact']} images per second of a core's time to its {median['pytorch']}, "
        f"{median['fast']} with" in readme
    )
