import jax
import numpy as np
import pytest
from flax import nnx

from hybrid_flax import evaluate
from hybrid_flax.build import build_model
from hybrid_flax.data.sources import open_source
from hybrid_flax.data.transforms import EvalTransform
from hybrid_flax.distributed.mesh import make_mesh
from hybrid_flax.run.checkpoints import Checkpoints
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
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(5, {**weights, "ema": weights}, {"model": "unified_convnext_micro"})
    checkpoints.wait()
    assert evaluate.main(tiny.get_config(), str(tmp_path)) == 0
    said = capsys.readouterr().out
    assert f"unified_convnext_micro at step 5 of {tmp_path}, digits:" in said
    assert said.count("over 360 images") == 2


def test_weights_of_another_model_are_refused(weights, tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(5, weights, {"model": "unified_convnext_micro"})
    checkpoints.wait()
    with pytest.raises(ValueError, match="of another model or optimizer") as error:
        evaluate.main(tiny.get_config(model__num_classes=11), str(tmp_path))
    assert "params/head/bias: there float32 (10,), here float32 (11,)" in str(error.value)
    assert np.size(weights["params"]["head"]["bias"]) == 10
