"""From annotating a folder of images to token labelling with its maps."""

import os

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image

import hybrid_flax.make_label_maps
from hybrid_flax.build import build_model, prepare
from hybrid_flax.data.images import eval_crop
from hybrid_flax.errors import InputError
from hybrid_flax.run.checkpoints import Checkpoints
from hybrid_flax.settings import from_config
from hybrid_flax.start import TrainedWeights
from hybrid_flax.train import train
from hybrid_flax.training.batch_augmentation import normalise
from hybrid_flax.weights import bridge
from tests import tiny

MODEL = {"dataset__name": "image_folder", "model__num_classes": 2, "dataset__num_workers": 0}


@pytest.fixture
def folder(tmp_path):
    """Sixteen photos of two classes, wider than high."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("ant", "bee"):
            (tmp_path / split / label).mkdir(parents=True)
            for number in range(8):
                pixels = rng.integers(0, 256, (40, 60, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / label / f"{label}_{number}.png")
    return tmp_path


@pytest.fixture
def annotated(folder):
    """(config of the annotating model, the folder of its maps, the model)"""
    config = tiny.get_config(dataset__path=str(folder), eval__batch_size=4, **MODEL)
    model = build_model(from_config(config), rngs=nnx.Rngs(0))
    weights = bridge.get_weights(model)
    checkpoints = Checkpoints(folder / "run" / "checkpoints", keep=1)
    checkpoints.save(0, weights, {"model": config.model.name})
    checkpoints.wait()
    out = folder / "maps"
    hybrid_flax.make_label_maps.main(config, str(folder / "run"), str(out))
    return config, out, model


def test_maps_hold_the_highest_logits_of_every_place(annotated, folder, capsys):
    config, out, model = annotated
    found = torch.load(out / "bee" / "bee_2.pt", weights_only=True).numpy()
    assert found.dtype == np.float16
    photo = Image.open(folder / "train" / "bee" / "bee_2.png")
    pixels = eval_crop(photo, 32, config.eval.crop_fraction, config.eval.crop_mode)
    images = normalise(jnp.asarray(pixels)[None], config.dataset.mean, config.dataset.std)
    dense = np.asarray(model.dense_logits(images))[0]
    np.testing.assert_allclose(dense.mean((0, 1)), model(images)[0], atol=1e-5)
    assert found.shape == (2, 2, *dense.shape[:2])  # of two classes all are the highest
    np.testing.assert_allclose(found[0], np.sort(dense)[..., ::-1].transpose(2, 0, 1), atol=2e-3)
    np.testing.assert_array_equal(found[1], np.argsort(-dense).transpose(2, 0, 1))

    (out / "ant" / "ant_0.pt").unlink()
    untouched = (out / "bee" / "bee_2.pt").stat().st_mtime_ns
    capsys.readouterr()
    hybrid_flax.make_label_maps.main(config, str(folder / "run"), str(out))
    assert "15 of 16 images have a map" in capsys.readouterr().out
    assert (out / "ant" / "ant_0.pt").exists()
    assert (out / "bee" / "bee_2.pt").stat().st_mtime_ns == untouched


def test_maps_of_logits_that_are_not_finite_are_not_written(annotated, folder):
    config, out, model = annotated
    weights = bridge.get_weights(model)
    weights["params"]["head"]["bias"] = jnp.full(2, 1e5)  # float16 ends at 65504
    checkpoints = Checkpoints(folder / "run" / "checkpoints", keep=1)
    checkpoints.save(1, weights, {"model": config.model.name})
    checkpoints.wait()
    (out / "bee" / "bee_2.pt").unlink()
    with pytest.raises(InputError, match=r"1 of 1 images get no map, such as .*bee_2.png: their"):
        hybrid_flax.make_label_maps.main(config, str(folder / "run"), str(out))
    assert not (out / "bee" / "bee_2.pt").exists()


def tklb(folder, maps, **overrides):
    """Two steps of a tiny token-labelled GLNet."""
    config = tiny.get_config(
        dataset__path=str(folder),
        dataset__label_maps=str(maps),
        model__name="glnet_4g_tklb",
        model__batch_norm_group=4,
        augment__mixup_alpha=0.0,
        augment__cutmix_alpha=0.0,
        batch_size=16,
        **MODEL | overrides,
    )
    with config.unlocked():
        config.model.overrides = {"dim": 32, "depths": (1, 1, 1, 1)}
    return config


@pytest.mark.slow
def test_a_token_labelled_model_trains_with_the_maps(annotated, folder):
    _, out, _ = annotated
    config = tklb(folder, out, accumulation_steps=2)
    assert train(config, str(folder / "tklb")) == 0
    records = (folder / "tklb" / "metrics.jsonl").read_text()
    assert '"train/loss"' in records


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"augment__mixup_alpha": 0.8}, "are mixed inside the model; set --config.augment.mixup"),
        ({"dataset__name": "digits", "model__num_classes": 0}, "image digit 0 has no label map"),
        ({"dataset__label_maps": "nowhere"}, "label_maps=nowhere: there is no such folder"),
    ],
)
def test_what_does_not_go_with_maps(folder, overrides, message):
    (folder / "maps").mkdir()
    config = tklb(folder, folder / "maps")
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in overrides.items()})
    with pytest.raises(ValueError, match=message):
        train(config, str(folder / "run"))


def test_models_without_places_cannot_annotate(folder, monkeypatch):
    config = tiny.get_config(dataset__path=str(folder), **MODEL)
    config.model.name = "ga_convnext_t"
    with config.unlocked():
        config.model.overrides = {}
    found = TrainedWeights(prepare(from_config(config), "train"), 0, {}, None)
    monkeypatch.setattr(hybrid_flax.make_label_maps, "open_trained", lambda *_: found)
    with pytest.raises(ValueError, match="ga_convnext_t cannot annotate: its classifier reads the"):
        hybrid_flax.make_label_maps.main(config, str(folder / "run"), str(folder / "maps"))


def test_maps_are_written_below_out_and_through_no_link(tmp_path):
    label_map, out = np.zeros((2, 1, 3, 3), np.float16), tmp_path / "maps"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("mine")
    (out / "a").mkdir(parents=True)
    for link in ("x.pt", "x.pt.part"):
        (out / "a" / link).symlink_to(elsewhere / "mine")
    hybrid_flax.make_label_maps._save(label_map, str(out / "a" / "x.pt"), str(out))
    assert torch.load(out / "a" / "x.pt").shape == label_map.shape
    assert os.listdir(out / "a") == ["x.pt"]
    assert (elsewhere / "mine").read_text() == "mine"
    (out / "b").symlink_to(elsewhere)
    with pytest.raises(InputError, match="b is a link to .*elsewhere: .*--out=.*Remove the link"):
        hybrid_flax.make_label_maps._save(label_map, str(out / "b" / "x.pt"), str(out))
    assert os.listdir(elsewhere) == ["mine"]


def test_a_place_where_nothing_can_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"--out=.*file: cannot make this folder"):
        hybrid_flax.make_label_maps._check_out(str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot write label map .*file/a/x.pt"):
        hybrid_flax.make_label_maps._save(
            np.zeros((2, 1, 3, 3), np.float16), str(tmp_path / "file" / "a" / "x.pt"), str(tmp_path)
        )
