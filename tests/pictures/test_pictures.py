import numpy as np
import pytest

from hybrid_flax.errors import InputError
from hybrid_flax.models import registry
from hybrid_flax.pictures import KINDS, Panel, default_kinds, draw, figure, heat, page
from hybrid_flax.pictures.canvas import TILE, marked, picture_panel, stacked
from hybrid_flax.pictures.draw import Subject
from hybrid_flax.pictures.page import embedded
from tests import reference

PIXELS = np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)


def subject(name, layers=None):
    model = reference.model(name, num_classes=5, **registry.tiny_model(name))
    size = model.image_size
    image = reference.images(0, (1, size, size, 3))
    pixels = np.resize(PIXELS, (size, size, 3))
    return Subject(model, name, image, pixels, (0.5, 0.5), layers, 1, "a class")


@pytest.mark.parametrize(
    ("name", "kind", "layers"),
    [
        ("glnet_4g", "slots", ["stages/0/blocks/0/mixer", "stages/1/blocks/0/mixer"]),
        ("gcvit_xxt", "attention", ["stages/0/blocks/0/attn", "stages/1/blocks/1/attn"]),
        ("ga_vit_s", "attention", ["heads/0/attn"]),
        ("unified_internimage_micro", "offsets", ["stages/0/blocks/0/mixer"]),
        ("ga_vit_s", "gram", ["heads"]),
        pytest.param("gcvit_xxt", "features", ["stages"], marks=pytest.mark.slow),
        pytest.param("gcvit_xxt", "cam", ["norm"], marks=pytest.mark.slow),
        pytest.param("unified_convnext_micro", "erf", ["stage1", "stage4"], marks=pytest.mark.slow),
    ],
)
def test_every_kind_is_drawn(name, kind, layers):
    found = draw(kind, subject(name))
    assert kind in KINDS
    assert set(layers) <= {picture.layer for picture in found}
    for picture in found:
        assert picture.image.width > TILE
        assert np.asarray(picture.image).std() > 10


def test_families_have_what_suits_them():
    kinds = {name: default_kinds(subject(name).model) for name in ("glnet_4g", "ga_vit_s")}
    assert kinds == {
        "glnet_4g": ["slots", "attention", "cam"],
        "ga_vit_s": ["attention", "gram", "cam"],
    }
    assert default_kinds(subject("unified_convnext_micro").model) == ["erf", "cam"]


def test_what_cannot_be_drawn_is_said():
    with pytest.raises(InputError, match="--what=maps: expected some of slots, attention, offsets"):
        draw("maps", subject("gcvit_xxt"))
    with pytest.raises(InputError, match="this GCViT has no slots"):
        draw("slots", subject("gcvit_xxt"))
    with pytest.raises(InputError, match="layer='head': there is no slots there"):
        draw("slots", subject("glnet_4g", ("head",)))


def test_a_panel_says_its_own_scale():
    values = np.array([[0.0, 0.25], [0.5, 1.0]])
    panel = heat(values, PIXELS, "shares")
    assert panel.label == "shares [0, 1]"
    assert panel.pixels.shape == (TILE, TILE, 3)
    alone = heat(values / 2, None, "shares")
    assert alone.label == "shares [0, 0.5]"
    assert np.array_equal(alone.pixels, heat(values, None, "").pixels)  # contrast of its own
    shared = heat(values / 2, None, "shares", limits=(0, 1))
    assert not np.array_equal(shared.pixels, alone.pixels)
    signed = heat(np.array([[-2.0, 0.0, 1.0]]), None, "", signed=True)
    assert signed.label == " [-2, 2]"
    left, middle, right = (signed.pixels[0, x] for x in (0, signed.pixels.shape[1] // 2, -1))
    assert left[2] > left[0]  # blue below 0
    assert right[0] > right[2]
    assert min(middle) > 240
    constant = heat(np.zeros((2, 2)), None, "nothing")
    assert constant.label == "nothing [0, 0]"


def test_figures_hold_all_panels_and_the_caption():
    panels = [Panel(np.tile(np.uint8([7, 99, 201]), (30, 40, 1)), f"number {i}") for i in range(5)]
    image = figure(panels, "A long caption. " * 10, columns=3)
    pixels = np.asarray(image)
    assert (pixels == [7, 99, 201]).all(-1).sum() == 5 * 30 * 40
    twice = stacked([image, image])
    assert twice.height == 2 * image.height
    dot = marked(picture_panel(PIXELS, ""), [(16, 16, 4, "red")], PIXELS.shape)
    assert dot.pixels[115, 115].tolist() == [255, 0, 0]


def test_a_page_needs_no_other_file():
    image = figure([picture_panel(PIXELS, "x")], "y")
    text = page("T & U", "words", {"<file>": [embedded(image, "a 'picture'")]})
    assert "data:image/png;base64," in text
    assert "T &amp; U" in text
    assert "&lt;file&gt;" in text
    assert "http" not in text
