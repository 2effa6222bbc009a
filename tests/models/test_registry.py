"""What holds for every registered model, and the registry's and the bridge's own behaviour."""

import collections
import functools

import jax
import jax.numpy as jnp
import pytest

import hybrid_flax
from hybrid_flax.weights import bridge
from hybrid_flax.weights.functions import as_function
from hybrid_flax.weights.paths import flatten, is_classifier, unflatten, unflatten_like

# One of each kind, the smallest.
SMALLEST = [
    "ga_convnext_t", "ga_cswin_t", "ga_resnet50", "ga_vit_s", "gcvit_xxt", "glnet_4g",
    "glnet_4g_tklb", "glnet_stl", "glnet_stl_paramslot", "l2vit_t", "unified_convnext_micro",
    "unified_halonet_micro", "unified_internimage_micro", "unified_pvt_micro",
    "unified_swin_micro",
]  # fmt: skip


def test_list_models():
    assert hybrid_flax.list_models("gcvit_l*") == ["gcvit_l", "gcvit_l_384", "gcvit_l_512"]
    assert hybrid_flax.list_models("nothing*") == []
    families = collections.Counter(name.split("_")[0] for name in hybrid_flax.list_models())
    assert families == {"gcvit": 10, "l2vit": 4, "glnet": 7, "ga": 10, "unified": 20}


@pytest.mark.parametrize("name", hybrid_flax.list_models())
def test_every_model_has_exactly_the_published_parameters(name):
    model = bridge.abstract(lambda: hybrid_flax.create_model(name))
    leaves = jax.tree.leaves(bridge.get_weights(model)["params"])
    assert sum(leaf.size for leaf in leaves) == hybrid_flax.model_info(name).parameters
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", hybrid_flax.list_models())
def test_every_model_says_where_it_comes_from(name):
    info = hybrid_flax.model_info(name)
    unpublished = name in ("ga_convnext_t_768", "ga_convnext_s_768", "ga_convnext_b_1024")
    assert unpublished or 72 < info.top1 < 90
    assert unpublished or 0.5 < info.gflops < 250
    assert ((info.top1, info.gflops) == (None, None)) == unpublished
    assert info.licence
    assert info.release_page.startswith("https://")
    assert bool(info.release_file) != name.startswith("ga_")  # no GA weights were released
    assert not info.download_url or info.download_url.endswith(info.release_file)
    assert info.eval_transform.crop_mode in ("center", "squash")


@pytest.mark.parametrize("name", SMALLEST)
def test_the_same_interface_everywhere(name):
    model = bridge.abstract(lambda: hybrid_flax.create_model(name, num_classes=5))
    apply, weights = as_function(model), bridge.get_weights(model)
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    maps = jax.eval_shape(lambda w, x: apply(w, x, method="intermediates"), weights, images)
    assert (maps["logits"].shape, maps["logits"].dtype) == ((2, 5), jnp.float32)
    features = jax.eval_shape(lambda w, x: apply(w, x, method="features"), weights, images)
    strides = (16,) if name == "ga_vit_s" else (4, 8, 16, 32)
    assert [feature.shape[:3] for feature in features] == [(2, 224 // s, 224 // s) for s in strides]
    with pytest.raises(ValueError, match="train=True needs key="):
        jax.eval_shape(lambda w, x: apply(w, x, train=True), weights, images)
    for shape in ((2, 3, 224, 224), (224, 224, 3), (2, 224, 224, 1)):
        with pytest.raises(ValueError, match=r"images must be \[B, H, W, 3\].*got shape \("):
            jax.eval_shape(apply, weights, jax.ShapeDtypeStruct(shape, jnp.float32))


def test_unknown_names_are_refused_with_a_suggestion():
    with pytest.raises(ValueError, match=r"unknown model 'gcvit_bb'\. Did you mean gcvit_b"):
        hybrid_flax.create_model("gcvit_bb")
    with pytest.raises(ValueError, match="no field 'depth' to override; it has dim, depths"):
        hybrid_flax.create_model("gcvit_b", depth=3)
    with pytest.raises(ValueError, match="num_classes=0: a classifier needs"):
        hybrid_flax.create_model("gcvit_b", num_classes=0)
    for depths in ((1, 0, 1, 1), (1, 1, 1), ()):
        with pytest.raises(
            ValueError, match=r"depths=\(.*: l2vit_t has 4 stages, each of at least"
        ):
            hybrid_flax.create_model("l2vit_t", depths=depths)


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


def test_classifiers_are_known_by_their_name():
    assert is_classifier("params/head/bias")
    assert is_classifier("ema/params/heads/2/classifier/kernel")
    assert not is_classifier("params/stages/0/blocks/0/mlp/fc1/kernel")


@pytest.mark.parametrize("name", ["gcvit_xxt", "l2vit_t", "glnet_stl", "unified_pvt_micro"])
def test_every_place_of_the_last_map_has_logits(name):
    model = bridge.abstract(lambda: hybrid_flax.create_model(name, num_classes=7))
    images = jax.ShapeDtypeStruct((2, 224, 224, 3), jnp.float32)
    apply, weights = as_function(model), bridge.get_weights(model)
    dense = jax.eval_shape(functools.partial(apply, method="dense_logits"), weights, images)
    assert (dense.shape, dense.dtype) == ((2, 7, 7, 7), jnp.float32)


@pytest.mark.parametrize("name", ["l2vit_t", "unified_pvt_micro"])
def test_a_trunk_has_no_logits_of_places(name):
    model = bridge.abstract(lambda: hybrid_flax.create_model(name, detection=True))
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    apply, weights = as_function(model), bridge.get_weights(model)
    with pytest.raises(ValueError, match="built with detection=True and has no classifier"):
        jax.eval_shape(functools.partial(apply, method="dense_logits"), weights, images)
