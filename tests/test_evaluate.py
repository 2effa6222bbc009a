import jax
import numpy as np
import pytest
from flax import nnx

from hybrid_flax import evaluate
from hybrid_flax.build import build_model
from hybrid_flax.data.sources import open_source
from hybrid_flax.data.sources.part import part_of
from hybrid_flax.data.transforms import EvalTransform
from hybrid_flax.distributed.mesh import make_mesh
from hybrid_flax.errors import InputError
from hybrid_flax.run.checkpoints import Checkpoints
from hybrid_flax.settings import to_plain
from hybrid_flax.training.step import make_eval_step
from hybrid_flax.weights import bridge
from hybrid_flax.weights.functions import as_function
from tests import tiny


@pytest.fixture(scope="module")
def weights():
    config = tiny.settings(model__num_classes=10)
    return jax.jit(lambda: bridge.get_weights(build_model(config, rngs=nnx.Rngs(3))))()


def results(weights, devices, batch_size, source=None):
    config = tiny.settings(model__num_classes=10, eval__batch_size=batch_size)
    mesh = make_mesh(jax.devices()[:devices])
    model = bridge.abstract(lambda: build_model(config, rngs=nnx.Rngs(0)))
    transform = EvalTransform.from_config(config, source or open_source("digits", "", "val"))
    step = make_eval_step(as_function(model), config.dataset, mesh)
    weights = jax.device_get(weights)
    return evaluate.evaluate(step, {"val": weights}, transform, config, mesh)["val"]


def test_every_image_counts_once_whatever_the_batch_and_the_devices(weights):
    want = results(weights, 1, 360)
    assert want["images"] == 360
    for devices, batch_size in ((1, 7), (8, 100), (3, 64), (8, 1), (5, 1000)):
        got = results(weights, devices, batch_size)
        assert got["images"] == 360
        assert (got["top1"], got["top5"]) == (want["top1"], want["top5"])
        assert got["loss"] == pytest.approx(want["loss"], rel=1e-5)


def test_both_sets_of_weights_are_evaluated_in_one_pass(weights):
    other = jax.tree.map(lambda leaf: leaf * 0.5, weights)
    config = tiny.settings(model__num_classes=10)
    mesh = make_mesh(jax.devices()[:1])
    model = bridge.abstract(lambda: build_model(config, rngs=nnx.Rngs(0)))
    step = make_eval_step(as_function(model), config.dataset, mesh)
    transform = EvalTransform.from_config(config, open_source("digits", "", "val"))
    both = evaluate.evaluate(step, {"val": weights, "val_ema": other}, transform, config, mesh)
    assert both["val"]["loss"] != both["val_ema"]["loss"]
    alone = evaluate.evaluate(step, {"val": other}, transform, config, mesh)
    assert alone["val"] == both["val_ema"]
    text = evaluate.show_results(both)
    assert "trained weights : top-1" in text
    assert "averaged weights: top-1" in text
    assert "over 360 images" in text


def test_evaluation_can_be_interrupted(weights):
    config = tiny.settings(model__num_classes=10)
    mesh = make_mesh(jax.devices()[:1])
    transform = EvalTransform.from_config(config, open_source("digits", "", "val"))
    stopped = evaluate.evaluate(
        lambda *_: {}, {"val": weights}, transform, config, mesh, should_stop=lambda: True
    )
    assert stopped is None


def test_the_program_evaluates_what_a_work_directory_holds(weights, tmp_path, capsys):
    run = tiny.settings(model__num_classes=10, dataset__val_split="val[:40]")
    names = [str(digit) for digit in range(10)]
    meta = {"model": run.model.name, "config": to_plain(run), "data": {"class_names": names}}
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(5, {**weights, "ema": weights}, meta)
    checkpoints.wait()
    assert evaluate.main(tiny.get_config(), str(tmp_path), given=()) == 0
    said = capsys.readouterr().out
    assert "dataset.val_split='val[:40]' (the config has 'val')" in said
    assert f"unified_convnext_micro at step 5 of {tmp_path}, digits:" in said
    assert said.count("over 40 images") == 2


def scored(count, total=8, bad=0, **overrides):
    """Evaluates images of which `count` are scored and `bad` have logits that are not finite."""
    sums = {"top1": count / 2, "top5": count, "loss": 0.5 * count, "images": count}
    config = tiny.settings(**{"model__num_classes": 10, "eval__batch_size": total, **overrides})
    source = part_of(open_source("digits", "", "val"), f":{total}", "val")
    return evaluate.evaluate(
        lambda *_: {name: np.float32(x) for name, x in {**sums, "non_finite": bad}.items()},
        {"val": {}, "val_ema": {}},
        EvalTransform.from_config(config, source),
        config,
        make_mesh(jax.devices()[:1]),
    )


def test_what_cannot_be_scored_is_said(caplog):
    found = scored(6, bad=2)
    assert found["val"] == {
        "top1": 50.0, "top5": 100.0, "loss": 0.5, "images": 6, "non_finite": 2
    }  # fmt: skip
    assert "over 6 images; 2 more have NaN or infinite logits" in evaluate.show_results(found)
    assert "val_ema: the logits of 2 images are NaN or infinite; they are not" in caplog.text
    assert "non_finite" not in scored(8)["val"]


def test_nothing_scored_is_an_error():
    with pytest.raises(
        InputError, match="logits of all 8 images .* with the trained weights: noth"
    ):
        scored(0, bad=8)
    with pytest.raises(InputError, match="none of the 8 validation images can be read"):
        scored(0)


def test_labels_beyond_the_model_are_an_error():
    with pytest.raises(InputError, match="labels up to 9, but the model has 4 classes, 0 to 3"):
        scored(8, model__num_classes=4)


def test_weights_of_another_model_are_refused(weights, tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(5, weights, {"model": "unified_convnext_micro"})
    checkpoints.wait()
    with pytest.raises(ValueError, match="of another model or optimizer") as error:
        evaluate.main(tiny.get_config(model__num_classes=11), str(tmp_path))
    assert "params/head/bias: there float32 (10,), here float32 (11,)" in str(error.value)
    assert np.size(weights["params"]["head"]["bias"]) == 10
