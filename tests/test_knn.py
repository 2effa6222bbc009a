import re

import jax
import numpy as np
import pytest

import hybrid_flax
from hybrid_flax import knn
from hybrid_flax.data.sources import open_source
from hybrid_flax.data.sources.part import part_of
from hybrid_flax.distributed.mesh import make_mesh
from hybrid_flax.run.checkpoints import Checkpoints
from hybrid_flax.weights import bridge
from hybrid_flax.weights.functions import as_function
from tests import reference, tiny


def unit(features):
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)


def test_neighbours_vote_with_the_weight_of_their_similarity():
    bank = unit(np.array([[1, 0.1], [0.2, 1], [0.1, 1], [-1, 0]], float))
    labels, query = np.array([2, 1, 1, 0]), unit(np.array([[1.0, 0.3]]))

    def predicted(neighbours, temperature):
        found = knn.knn_predictions(
            query, bank, labels, 3, neighbours=neighbours, temperature=temperature
        )
        return found.tolist()

    assert predicted(1, 0.07) == [2]
    # At a low temperature the nearest decides, at a high one the majority of the three.
    assert predicted(3, 0.07) == [2]
    assert predicted(3, 10.0) == [1]


def test_many_queries_and_a_plain_calculation():
    rng = np.random.default_rng(0)
    bank, queries = unit(rng.normal(size=(400, 8))), unit(rng.normal(size=(300, 8)))
    labels = rng.integers(0, 5, 400)
    want = []
    for query in queries:
        similarity = bank.astype(float) @ query
        nearest = np.argsort(-similarity)[:20]
        votes = np.bincount(labels[nearest], np.exp(similarity[nearest] / 0.07), minlength=5)
        want.append(votes.argmax())
    assert knn.knn_predictions(queries, bank, labels, 5).tolist() == want


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"neighbours": 0}, "--neighbours=0: expected a number from 1 to 3, the training images"),
        ({"neighbours": 4}, "--neighbours=4: expected a number from 1 to 3"),
        ({"neighbours": 1, "temperature": 0.0}, "--temperature=0.0: expected a number above 0"),
    ],
)
def test_unusable_numbers_are_refused(arguments, message):
    bank = np.eye(3, dtype=np.float32)
    with pytest.raises(ValueError, match=re.escape(message)):
        knn.knn_predictions(bank, bank, np.arange(3), 3, **arguments)


def test_the_program_needs_no_fitting_classifier(tmp_path, capsys):
    config = tiny.get_config(eval__batch_size=360, dataset__train_split="train[:90%]")
    model = reference.model(
        config.model.name, num_classes=7, image_size=32, **config.model.overrides
    )
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(5, bridge.get_weights(model), {"model": config.model.name})
    checkpoints.wait()
    assert knn.main(config, str(tmp_path), neighbours=5) == 0
    said = capsys.readouterr().out
    assert "replaced by a fresh one" not in said  # no classifier is used
    found = re.search(
        r"unified_convnext_micro at step 5 of .*, digits:\n  trained weights: top-1 ([\d.]+) % "
        r"of 360 images, by the 5 nearest of 1293 training images",
        said,
    )
    assert float(found[1]) > 40  # untrained features keep a digit beside its likes
    with pytest.raises(ValueError, match="--neighbours=2000: expected a number from 1 to 1293"):
        knn.main(config, str(tmp_path), neighbours=2000)


def test_the_features_of_several_heads_follow_each_other():
    model = bridge.abstract(lambda: hybrid_flax.create_model("ga_convnext_t"))
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), np.float32)
    apply, weights = as_function(model), bridge.get_weights(model)
    features = jax.eval_shape(lambda w, x: knn.pooled_features(apply, w, x), weights, images)
    assert features.shape == (2, 5 * 688)


def test_features_that_are_not_finite_are_left_out_and_said(caplog):
    config = tiny.settings(model__num_classes=10, eval__batch_size=4)
    source = part_of(open_source("digits", "", "val"), ":10", "val")
    mesh = make_mesh(jax.devices()[:1])
    found = np.ones((4, 3), np.float32)
    found[1, 2] = np.nan
    features, labels = knn.extract(lambda *_: found, {}, source, config, mesh)
    assert len(features) == len(labels) == 7
    assert np.isfinite(features).all()
    assert "3 of 10 images have NaN or infinite features" in caplog.text
    with pytest.raises(ValueError, match="the features of all 10 images that can be read are NaN"):
        knn.extract(lambda *_: found * np.nan, {}, source, config, mesh)
