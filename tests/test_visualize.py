import re

import pytest
from PIL import Image

from hybrid_flax import visualize
from hybrid_flax.errors import InputError
from tests import trained

OPTIONS = {
    **dict.fromkeys(("model", "checkpoint", "class_names", "layer", "class", "steps"), ""),
    "what": "features",
    "place": "0.5,0.5",
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return trained.write(tmp_path_factory.mktemp("run"), (5, 9))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return trained.photos(tmp_path_factory.mktemp("images") / "digits")


def test_every_image_has_its_pictures_and_the_page_has_all(workdir, images, tmp_path, capsys):
    (tmp_path / "broken.png").write_text("no image")
    files = f"{images},{tmp_path}/broken.png"
    options = OPTIONS | {"images": files, "out": f"{tmp_path}/out", "what": "features,cam"}
    assert visualize.main(None, workdir, options, given=()) == 0
    assert "4 pictures and index.html are in" in capsys.readouterr().out
    page = (tmp_path / "out" / "index.html").read_text()
    assert page.count("data:image/png") == 4
    assert "averaged" not in page
    assert "unified_convnext_micro, step 9 of" in page
    assert re.search(r"<td>\d</td><td>0\.\d{3}</td>", page)
    assert "cannot read image" in page
    names = sorted(file.name for file in (tmp_path / "out").glob("*.png"))
    assert names == [
        f"digit{i}_{kind}.png" for i in (0, 1) for kind in ("cam_conv-head", "features_stages")
    ]


def test_the_same_image_through_a_run(workdir, images, tmp_path):
    for steps, name in (("", "one"), ("all", "both"), ("5", "first")):
        out = {"images": f"{images}/digit0.png", "out": f"{tmp_path}/{name}", "steps": steps}
        assert visualize.main(None, workdir, OPTIONS | out, given=()) == 0
    heights = []
    for name in ("one", "both", "first"):
        with Image.open(tmp_path / name / "digit0_features_stages.png") as picture:
            heights.append(picture.height)
    assert heights[1] == heights[0] + heights[2]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"images": ""}, "--images is missing: expected a folder, or files with commas"),
        ({"images": "/nowhere"}, "--images=/nowhere: there is no such file or folder"),
        ({"out": ""}, "--out is missing: expected a folder for the pictures"),
        ({"what": "maps"}, "--what=maps: expected some of slots, attention"),
        ({"what": "slots"}, "this Unified has no slots: take a GLNet"),
        ({"layer": "stage9"}, "layer='stage9' is not there in this Unified. Did you mean stage"),
        ({"place": "2,0"}, "--place=2,0: expected two fractions of the image"),
        ({"class": "10"}, "--class=10: expected 0 to 9"),
        ({"class": "dog"}, "--class=dog: expected the number of a class"),
        ({"steps": "7"}, "has no checkpoint of step 7; there are: 5, 9"),
        ({"steps": "new"}, "--steps=new: expected all, or steps with commas between"),
        ({"model": "gcvit_b"}, "give a run, --workdir=DIR, or a released model, --model=NAME"),
    ],
)
def test_what_cannot_be_drawn_is_said(workdir, images, tmp_path, changed, message):
    options = OPTIONS | {"images": images, "out": str(tmp_path)} | changed
    with pytest.raises(InputError, match=re.escape(message)):
        visualize.main(None, workdir, options, given=())
