import jax
import numpy as np
import pytest
from PIL import Image

from hybrid_flax.data.sources.files import FileSource
from hybrid_flax.data.transforms import EvalTransform
from hybrid_flax.distributed.mesh import make_mesh
from hybrid_flax.errors import InputError
from hybrid_flax.evaluation import scoring, sets

LOGITS = np.array([[3, 2, 1, 0, -1, -2, -9], [0, 1, 2, 3, 4, 5, -9]], np.float32)


@pytest.fixture
def part(tmp_path):
    files = []
    for number in range(3):
        files.append(str(tmp_path / f"{number}.png"))
        Image.new("RGB", (16, 16), (number, 0, 0)).save(files[-1])
    with open(files[1], "w") as stream:
        stream.write("no image")
    return sets.Part("", FileSource(files, np.array([1, 0, 5]), 7), None)


def asked(part, logits=LOGITS, **arguments):
    rows = {0: 0, 2: 1}  # which logits an image has, by its red

    def step(images):
        return np.stack([logits[rows.get(int(image[0, 0, 0]), 0)] for image in np.asarray(images)])

    transform = EvalTransform(part.source, 16, 1.0, "center", "bicubic", skip_unreadable=True)
    return scoring.answers(step, part, transform, make_mesh(jax.devices()[:1]), 2, **arguments)


def test_every_readable_image_is_scored(part):
    found = asked(part)
    assert [image[-5:] for image in found.images] == ["0.png", "2.png"]
    assert found.right1.tolist() == [False, True]
    assert found.right5.tolist() == [True, True]
    assert found.metrics()["top1"] == 50
    want = -np.log(np.exp(2) / np.exp(LOGITS[0].astype(float)).sum())
    assert found.loss[0] == pytest.approx(want)


def test_several_classes_can_be_right(part):
    found = asked(part._replace(accepted=[(1, 0), (0,), (6, 0)]))
    assert found.right1.tolist() == [True, False]


def test_classes_that_take_no_part_are_left_out(part):
    found = asked(part, classes=np.array([1, 3, 5]))
    assert found.right1.tolist() == [True, True]
    assert found.best.tolist() == [[1, 3, 5], [5, 3, 1]]
    want = -np.log(np.exp(2) / np.exp([2.0, 0, -2]).sum())
    assert found.loss[0] == pytest.approx(want)


def test_what_cannot_be_scored_is_said(part):
    with pytest.raises(InputError, match="the set has the class 5, but the model has 4 classes"):
        asked(part, LOGITS[:, :4])
    with pytest.raises(InputError, match="logits are NaN or infinite"):
        asked(part, LOGITS * np.nan)
    with pytest.raises(InputError, match="--average=zooms: expected some of flips, crops"):
        scoring.check_average(["flips", "zooms"])


def test_averages_are_over_mirror_images_and_corners():
    mesh = make_mesh(jax.devices()[:1])
    images = np.random.default_rng(0).integers(0, 255, (1, 6, 6, 3), np.uint8)

    def apply(weights, images):
        return images[:, 0, 0]  # what stands in the upper left corner

    mean, std = (0.0,) * 3, (1.0,) * 3
    step = scoring.make_logit_step(apply, mean, std, mesh, 4, ("flips", "crops"))
    corners = [(0, 0), (0, 2), (2, 0), (2, 2), (1, 1)]
    want = [images[0, y, x] for y, x in corners] + [images[0, y, x + 3] for y, x in corners]
    np.testing.assert_allclose(step({}, images)[0], np.mean(want, axis=0) / 255, rtol=1e-5)


def test_the_corruption_error_of_alexnet_is_100():
    errors = {name: [error] * 5 for name, error in sets.ALEXNET.items()}
    assert scoring.corruption_error(errors) == pytest.approx(100)
    halved = {name: [error / 2] * 5 for name, error in sets.ALEXNET.items()}
    assert scoring.corruption_error(halved) == pytest.approx(50)
    assert len(errors) == 15


def test_a_comparison_is_mcnemars():
    images = [f"{number}" for number in range(12)]
    first = [(image, True) for image in images]
    second = [(image, number < 6) for number, image in enumerate(images)]
    found = scoring.compare(first, second)
    assert (found.first, found.second) == (100, 50)
    assert (found.only_first, found.only_second) == (6, 0)
    assert found.p_value == pytest.approx(2 / 2**6)
    assert scoring.compare(first, first).p_value == 1
    with pytest.raises(InputError, match="have 12 and 11 images, 11 of them in both"):
        scoring.compare(first, second[1:])
