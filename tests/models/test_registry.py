"""The registry and the bridge themselves; every model: test_contract.py."""

import functools

import jax
import jax.numpy as jnp
import pytest

import hybrid_flax
from hybrid_flax.weights import bridge
from hybrid_flax.weights.functions import as_function
from hybrid_flax.weights.paths import flatten, unflatten, unflatten_like


def test_list_models():
    assert hybrid_flax.list_models("gcvit_l*") == ["gcvit_l", "gcvit_l_384", "gcvit_l_512"]
    assert hybrid_flax.list_models("nothing*") == []
    assert len(hybrid_flax.list_models()) == len(set(hybrid_flax.list_models()))


@pytest.mark.parametrize("name", hybrid_flax.list_models())
def test_parameters_are_as_many_as_published(name):
    model = bridge.abstract(functools.partial(hybrid_flax.create_model, name))
    leaves = jax.tree.leaves(bridge.get_weights(model)["params"])
    assert sum(leaf.size for leaf in leaves) == hybrid_flax.model_info(name).parameters
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


def test_unknown_names_are_refused_with_a_suggestion():
    with pytest.raises(ValueError, match=r"unknown model 'gcvit_bb'\. Did you mean gcvit_b"):
        hybrid_flax.create_model("gcvit_bb")
    with pytest.raises(ValueError, match="no field 'depth' to override; it has dim, depths"):
        hybrid_flax.create_model("gcvit_b", depth=3)
    with pytest.raises(ValueError, match="num_classes=-1: expected a whole number from 0"):
        hybrid_flax.create_model("gcvit_b", num_classes=-1)
    for size in (0, 2.5, "224", (224,), (224, 224, 3), (224, 0), 10**9, [2, None]):
        with pytest.raises(ValueError, match=r"image_size=.*: expected a whole number from 1 "):
            hybrid_flax.create_model("gcvit_b", image_size=size)


def test_bridge_gives_plain_dictionaries_and_takes_them_back():
    def build():
        return hybrid_flax.create_model("l2vit_t", num_classes=3)

    model = bridge.abstract(build)
    weights = bridge.get_weights(model)
    assert type(weights["params"]["stages"]["0"]) is dict
    flat = flatten(weights)
    assert {path.split("/")[0] for path in flat} == {"params", "batch_stats"}
    assert flatten(unflatten(flat)).keys() == flat.keys()
    copy = bridge.abstract(build)
    filled = {path: jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in flat.items()}
    bridge.set_weights(copy, unflatten_like(weights, filled))
    for path, leaf in flatten(bridge.get_weights(copy)).items():
        assert leaf is filled[path]


@pytest.mark.parametrize("name", ["l2vit_t", "unified_pvt_micro"])
def test_a_trunk_has_no_logits_of_places(name):
    model = bridge.abstract(lambda: hybrid_flax.create_model(name, detection=True))
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    apply, weights = as_function(model), bridge.get_weights(model)
    with pytest.raises(ValueError, match="built with detection=True and has no classifier"):
        jax.eval_shape(functools.partial(apply, method="dense_logits"), weights, images)
