"""Where a run's weights come from: other checkpoints, released files, with a class map."""

import re

import jax
import numpy as np
import pytest
import torch
from flax import nnx

import convert
from hybrid_flax import start
from hybrid_flax.build import build_model
from hybrid_flax.distributed.mesh import make_mesh
from hybrid_flax.errors import InputError
from hybrid_flax.run.checkpoints import Checkpoints
from hybrid_flax.settings import from_config, to_plain
from hybrid_flax.weights import bridge
from hybrid_flax.weights.paths import flatten
from tests import reference, tiny
from tests.data.test_sources import write_images

VARIANT = {"dim": 32, "depths": (1, 2, 1, 1)}  # of tests/tiny.py


@pytest.fixture(scope="module")
def model():
    return reference.model("gcvit_xxt", num_classes=10, image_size=32, **VARIANT)


@pytest.fixture
def checkpoint(model, tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(0, bridge.get_weights(model), {"model": "gcvit_xxt"})
    checkpoints.wait()
    return str(tmp_path)


@pytest.fixture(autouse=True)
def fresh_weights(monkeypatch):
    """Stands in for the initialisation, which takes seconds to compile; all zeros."""

    def jit(function, **_):
        return lambda: jax.tree.map(
            lambda leaf: np.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function)
        )

    monkeypatch.setattr(start.jax, "jit", jit)


def started(classes=None, **changes):
    config = from_config(tiny.gcvit(**{"model__num_classes": 3, **changes}))

    def fresh():
        return bridge.get_weights(build_model(config, rngs=nnx.Rngs(0)))

    return start.initial_weights(config, fresh, make_mesh(jax.devices()[:1]), classes)["params"]


def test_position_tables_follow_the_image_size(checkpoint, capsys):
    params = started(init_from=checkpoint, model__image_size=64)
    assert params["stages"]["2"]["blocks"]["0"]["attn"]["position_bias"].shape == (49, 4)
    said = capsys.readouterr().out
    assert "5 learned position tables are resized to this image size" in said
    assert "the classifier for 10 classes is replaced by a fresh one for 3" in said


def test_a_class_map_keeps_rows_of_the_classifier(model, checkpoint, tmp_path, capsys):
    file = tmp_path / "map.txt"
    file.write_text("7\n0\n9\n")
    params = started(init_from=checkpoint, init_class_map=str(file))
    head = bridge.get_weights(model)["params"]["head"]
    np.testing.assert_array_equal(params["head"]["kernel"], head["kernel"][:, [7, 0, 9]])
    np.testing.assert_array_equal(params["head"]["bias"], head["bias"][np.array([7, 0, 9])])
    said = capsys.readouterr().out
    assert f"the classifier keeps 3 classes by {file}" in said
    assert "replaced by a fresh one" not in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\n2\n", "map.txt has 2 class indices, expected 3, one per line"),
        ("1\n2\n10\n", "class index 10 is out of range: this classifier has 10 classes, 0 to 9"),
        ("1\n2\n2\n", "class index 2 is given more than once"),
        ("1\n2\n-3\n", "map.txt, line 3: '-3' is not a class index, 0 or more"),
        ("1\n2\n" + "9" * 5000, "map.txt, line 3: '" + "9" * 40 + "' is not a class index, 0 or"),
        (None, "map.txt: No such file"),
    ],
)
def test_an_unusable_class_map_is_refused(checkpoint, tmp_path, text, message):
    if text is not None:
        (tmp_path / "map.txt").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        started(init_from=checkpoint, init_class_map=str(tmp_path / "map.txt"))


def test_a_class_map_alone_is_refused():
    with pytest.raises(ValueError, match="init_class_map: there are no weights"):
        started(init_class_map="map.txt")


def test_a_released_file_is_read(model, tmp_path, monkeypatch, capsys):
    state = {key: torch.tensor(array) for key, array in convert.to_state_dict(model).items()}
    file = tmp_path / "released.pth"
    torch.save({"state_dict": state}, file)
    # The release has the model's own size; this one is smaller.
    monkeypatch.setattr(
        "convert.pretrained.model_from_state_dict",
        lambda name, state: (convert.load_state_dict(model, state), (model, 10))[1],
    )
    params = started(init_from=str(file))
    want = bridge.get_weights(model)["params"]
    np.testing.assert_array_equal(params["stem"]["conv"]["kernel"], want["stem"]["conv"]["kernel"])
    assert not params["head"]["kernel"].any()
    said = capsys.readouterr().out
    assert f"starting from the weights of {file}" in said
    assert "the classifier for 10 classes is replaced by a fresh one for 3" in said

    torch.save({"state_dict": state | {"head.bias": torch.full((10,), torch.nan)}}, file)
    with pytest.raises(ValueError, match="released.pth: not all values are finite in params/head"):
        started(init_from=str(file))


def test_pretrained_takes_the_published_file(model, monkeypatch):
    asked = []

    def released(name, file):
        asked.append((name, file))
        return flatten(bridge.get_weights(model)), "cache/gcvit.pth"

    monkeypatch.setattr("convert.pretrained.released_weights", released)
    assert started(init_from="pretrained")["head"]["kernel"].shape == (256, 3)
    assert asked == [("gcvit_xxt", None)]
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        started(init_from="nowhere")


@pytest.fixture
def named(model, tmp_path):
    """A run whose classes are called a to j, of pictures that were normalised otherwise."""
    config = to_plain(from_config(tiny.gcvit(model__num_classes=10, dataset__std=(0.5, 0.5, 0.5))))
    meta = {"model": "gcvit_xxt", "config": config, "data": {"class_names": list("abcdefghij")}}
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(0, bridge.get_weights(model), meta)
    checkpoints.wait()
    return str(tmp_path)


def test_the_classifier_is_kept_by_the_names_of_the_classes(model, named, capsys, caplog):
    params = started(init_from=named, classes=["j", "new", "a"])
    head = bridge.get_weights(model)["params"]["head"]
    np.testing.assert_array_equal(
        params["head"]["bias"][np.array([0, 2])], head["bias"][np.array([9, 0])]
    )
    np.testing.assert_array_equal(params["head"]["kernel"][:, 0], head["kernel"][:, 9])
    assert not params["head"]["kernel"][:, 1].any()  # fresh
    said = capsys.readouterr().out
    assert "the classifier keeps 2 of 3 classes, by name; 1 begin fresh" in said
    assert (
        "--config.dataset.std=[0.229, 0.224, 0.225] (trained with [0.5, 0.5, 0.5])" in caplog.text
    )


def test_a_classifier_that_is_kept_for_classes_named_otherwise_is_said(model, named, caplog):
    other = [f"class {number}" for number in range(10)]
    params = started(init_from=named, classes=other, model__num_classes=10)
    head = bridge.get_weights(model)["params"]["head"]
    np.testing.assert_array_equal(params["head"]["kernel"], head["kernel"])
    assert "number 0 was 'a' in the checkpoint and is 'class 0' now, and so on" in caplog.text


@pytest.mark.parametrize("name", ["/dev/null", "no\0thing", "README.md", "tests"])
def test_what_holds_no_weights_is_refused(name):
    with pytest.raises(InputError):
        started(init_from=name)


def pictures(root, split, names):
    for name in names:
        write_images(root / split / name, 1)
    return tiny.gcvit(dataset__name="image_folder", dataset__path=str(root))


def test_validation_images_have_the_numbers_that_the_run_recorded(named, tmp_path):
    opened = start.open_trained(pictures(tmp_path, "val", "ac"), named, "val")
    np.testing.assert_array_equal(opened.prepared.source.labels, [0, 2])
    assert opened.prepared.config.model.num_classes == 10
    with pytest.raises(InputError, match="unknown"):
        start.open_trained(pictures(tmp_path, "val", ["unknown"]), named, "val")


def test_class_numbers_that_may_mean_something_else_are_warned_of(named, tmp_path, caplog):
    opened = start.open_trained(pictures(tmp_path, "train", "ca"), named, "train")
    np.testing.assert_array_equal(opened.prepared.source.labels, [0, 1])  # the dataset's own
    assert "not those that the model was trained with: 8 classes are gone: 'b', 'd'" in caplog.text


def test_classes_of_weights_without_names_are_warned_of(checkpoint, tmp_path, caplog):
    config = pictures(tmp_path / "photos", "val", "ac")
    config.model.num_classes = 10
    start.open_trained(config, checkpoint, "val")
    assert (
        "names of the model's 10 classes are not recorded: the dataset's 2, in the order"
        in caplog.text
    )
