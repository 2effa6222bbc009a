"""Properties that hold of every model, on tiny ones."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_flax import analysis
from hybrid_flax.analysis import attention, layers
from hybrid_flax.analysis.sampling import composed, spread, to_image
from hybrid_flax.analysis.slot_maps import first_medoids
from hybrid_flax.errors import InputError
from hybrid_flax.layers import BatchNorm
from hybrid_flax.models import registry
from pallas.watching import watched
from pallas.window_attention import window_attention
from tests import reference
from tests.analysis import golden

ATTENDING = ("gcvit_xxt", "l2vit_t", "glnet_4g", "ga_cswin_t", "ga_vit_s", "unified_pvt_micro")
IMAGES = jnp.asarray(reference.images(0, (2, 32, 32, 3)))


def tiny(name):
    model = reference.model(name, num_classes=5, **registry.tiny_model(name))
    for _, part in nnx.iter_modules(model):
        if isinstance(part, BatchNorm):  # means of 1 would leave ReLUs nothing
            part.mean[...] *= 0
    return model


def images_of(model):
    return reference.images(0, (1, *2 * (model.image_size,), 3))


@pytest.mark.parametrize("name", ATTENDING)
def test_weights_are_probabilities_that_explain_the_output(name):
    model = tiny(name)
    found = attention.attention_layers(model, images_of(model))
    assert found
    for path, each in found.items():
        sums = each.weights.sum(-1)
        if each.kind == "linear":
            assert (sums > 0).all()
        else:
            np.testing.assert_allclose(sums, 1, atol=1e-5, err_msg=path)
        out = np.einsum("bnhqk,bnkhe->bnqhe", each.weights, each.value)
        np.testing.assert_allclose(out, each.out, atol=1e-5 * np.abs(each.out).max())


def test_paths_are_those_of_the_modules_and_groups_come_first():
    model = tiny("gcvit_xxt")
    maps = analysis.attention_maps(model, IMAGES)
    assert list(maps)[:3] == [
        "stages/0/blocks/0/attn",
        "stages/1/blocks/0/attn",
        "stages/1/blocks/1/attn",
    ]
    assert maps["stages/0/blocks/0/attn"].shape == (2 * 64, 1, 1, 1)
    assert maps["stages/1/blocks/1/attn"].dtype == np.float32
    assert list(analysis.attention_maps(model, IMAGES, ["stages.1"])) == list(maps)[1:3]
    stripes = list(analysis.attention_maps(tiny("ga_cswin_t"), reference.images(0, (1, 64, 64, 3))))
    assert stripes[:2] == ["trunk/stages/0/0/stripes0", "trunk/stages/0/0/stripes1"]
    assert stripes[-1] == "heads/1/attn"


def test_nothing_is_computed_when_nobody_asks():
    model = tiny("l2vit_t")
    weights = "f32[2,2,16,16]"  # of linear attention: 2 images, 2 heads, 4×4 places of stage 2
    plain = str(jax.make_jaxpr(model)(IMAGES))
    with watched() as calls:
        jax.eval_shape(lambda x: model(x), IMAGES)  # not the program traced before
    assert weights not in plain
    (linear,) = (each for each in calls if each.kind == "linear attention")
    assert linear.arrays["weights"].shape == (2, 2, 16, 16)


def placed(seen):
    grid = (seen.geometry.height, seen.geometry.width)
    return attention._attention(
        attention._Seen("layer", seen.kind, seen.geometry, grid, seen.arrays), (32, 32)
    )


def swin_layer(shift):
    qkv = jax.random.normal(jax.random.key(0), (1, 8, 8, 3, 2, 4))
    with watched() as calls:
        window_attention(qkv, window=4, shift=shift)
    return placed(calls[0])


def test_a_shifted_window_is_put_back_where_it_is_on_the_map():
    each = swin_layer(1)
    assert each.kind == "shifted windows"
    middle = attention.attended_from(each, 0, 1, 4, 4)  # of the window from place 1 to 4
    assert middle.sum() == pytest.approx(1, abs=1e-5)
    assert (middle[1:5, 1:5] > 0).all()
    assert middle[1:5, 1:5].sum() == pytest.approx(1, abs=1e-5)
    corner = attention.attended_from(each, 0, 0, 0, 0)  # alone: the rest of its window is elsewhere
    assert corner[0, 0] == pytest.approx(1, abs=1e-5)
    assert (corner > 0).sum() == 1
    everywhere = attention.received(each, 0, 0)
    assert everywhere.sum() == pytest.approx(4, abs=1e-4)


def test_windows_of_a_global_query_are_joined_by_their_log_sum_exp():
    key, query = jax.random.split(jax.random.key(1))
    key_value = 2 * jax.random.normal(key, (1, 4, 4, 2, 1, 4))
    query = jax.random.normal(query, (1, 2, 2, 1, 4))
    with watched() as calls:
        window_attention(key_value, window=2, query=query)
    each = placed(calls[0])
    got = attention.attended_from(each, 0, 0, 1, 0)
    scores = np.einsum("d,ijd->ij", query[0, 1, 0, 0], key_value[0, :, :, 0, 0]) / 2
    want = np.exp(scores) / np.exp(scores).sum()  # one softmax over the whole map
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_slots_share_every_place():
    found = analysis.slots(tiny("glnet_4g"), reference.images(0, (1, 32, 48, 3)))
    assert next(iter(found)) == "stages/0/blocks/0/mixer"
    assert found["stages/0/blocks/0/mixer"].shape == (1, 64, 8, 12)
    for shares in found.values():
        np.testing.assert_allclose(shares.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize("case", golden.META["k_medoids"], ids=lambda case: str(case["start"]))
def test_medoids_are_those_of_the_authors_loop(case):
    distances = golden.ARRAYS[f"slots/{case['distances']}"]
    got = analysis.k_medoids(distances, np.array(case["start"]))
    assert got.tolist() == case["medoids_in_order"]
    total = distances[:, got].min(1).sum()
    assert total == pytest.approx(case["total_distance"])


def test_a_start_follows_from_the_distances():
    points = np.array([0.0, 0.1, 5.0, 5.1, 9.0])
    distances = np.abs(points[:, None] - points)
    start = first_medoids(distances, 3)
    assert sorted(points[start].round().tolist()) == [0, 5, 9]
    with pytest.raises(InputError, match="6 medoids: expected from 1 to 5"):
        first_medoids(distances, 6)
    with pytest.raises(InputError, match=r"start=\[1, 1\]: expected different whole numbers"):
        analysis.k_medoids(distances, [1, 1])


def test_points_without_offsets_are_the_kernels_grid():
    model = tiny("unified_internimage_micro")
    layer = model.stages[0].blocks[0].mixer
    layer.offsets.kernel[...] *= 0
    layer.offsets.bias[...] *= 0
    found = analysis.sampling_points(model, IMAGES)
    positions, weights = found["stages/0/blocks/0/mixer"]
    assert positions.shape == (2, 8, 8, 2, 9, 2)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
    assert positions[0, 3, 4, 1].tolist() == [
        [4 + x, 3 + y] for x in (-1, 0, 1) for y in (-1, 0, 1)
    ]
    assert spread((positions, weights)).distance == pytest.approx((4 + 4 * 2**0.5) / 9)
    assert to_image(np.array([0.0, 1.0]), 4).tolist() == [1.5, 5.5]
    places, shares = composed(*2 * (found["stages/0/blocks/0/mixer"],), 0, 4, 4)
    assert len(places) == (2 * 9) ** 2
    assert shares.sum() == pytest.approx(1, abs=1e-5)
    assert np.abs(places - 4).max() == 2


@pytest.mark.parametrize("name", ["gcvit_xxt", "l2vit_t", "glnet_4g", "unified_convnext_micro"])
def test_grad_cam_is_the_logits_of_places(name):
    model = tiny(name)
    classes = [3, 1]
    got = analysis.grad_cam(model, IMAGES, classes)
    dense = np.asarray(jax.jit(model.dense_logits)(IMAGES))
    want = np.stack([dense[i, ..., each] for i, each in enumerate(classes)])
    want = want - np.asarray(model.head.bias[...])[classes][:, None, None]
    np.testing.assert_allclose(got * want[0].size, want, atol=1e-4 * np.abs(want).max())
    by_place = analysis.grad_cam(model, IMAGES, classes, by_place=True)
    np.testing.assert_allclose(by_place, got, atol=1e-5 * np.abs(got).max())


@pytest.mark.slow
def test_grad_cam_of_any_layer_and_of_several_heads():
    model = tiny("ga_convnext_t")
    every, chosen = analysis.grad_cam(model, IMAGES), analysis.grad_cam(model, IMAGES, 2, "stage3")
    assert every.shape == (2, 2, 2)
    assert np.abs(chosen).max() > 0
    named = analysis.grad_cam(model, IMAGES, 2, "trunk.stages.2.blocks.1")
    np.testing.assert_allclose(named, chosen, atol=1e-6)
    gradient = layers.derivative(
        model, jnp.asarray(IMAGES), "stage5", lambda maps: maps["logits"].sum()
    )[1]
    assert gradient.shape == (2, 2, 2, 32)


class _Convolution(nnx.Module):
    """Nothing but a 3×3 convolution, as a model."""

    def __init__(self):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
        self.conv.kernel[...] = jnp.abs(self.conv.kernel[...])

    def intermediates(self, images):
        return {"stage4": self.conv(images)}

    feature_maps = ("stage4",)


def test_the_receptive_field_of_a_convolution_is_its_footprint():
    model = _Convolution()
    got = analysis.effective_receptive_field(model, jnp.ones((2, 8, 8, 3)))
    assert [index.tolist() for index in np.nonzero(got)] == [
        [3, 3, 3, 4, 4, 4, 5, 5, 5],
        [3, 4, 5] * 3,
    ]
    want = np.asarray(model.conv.kernel[...]).sum((2, 3))
    np.testing.assert_allclose(got[3:6, 3:6], want, rtol=1e-5)


@pytest.mark.parametrize("name", ["ga_resnet50", "unified_swin_micro"])
def test_receptive_fields_of_every_family_and_stage(name):
    model = tiny(name)
    images = images_of(model)
    first, last = (
        analysis.effective_receptive_field(model, images, layer) for layer in ("stage1", None)
    )
    assert first.shape == last.shape == images.shape[1:3]
    assert (first > 0).sum() < (last > 0).sum()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: analysis.slots(tiny("gcvit_xxt"), IMAGES),
            "this GCViT has no slots: take a GLNet, such as glnet_4g",
        ),
        (
            lambda: analysis.attention_maps(tiny("unified_convnext_micro"), IMAGES),
            "this Unified has no attention to show. GC ViT, L2ViT, GLNet",
        ),
        (
            lambda: analysis.sampling_points(tiny("gcvit_xxt"), IMAGES),
            "this GCViT has no deformable convolution: take a unified_internimage_* model",
        ),
        (
            lambda: analysis.gramian_similarity(tiny("gcvit_xxt"), IMAGES),
            "this GCViT has no Gramian heads: take a model whose name begins with ga_",
        ),
        (
            lambda: analysis.attention_maps(tiny("gcvit_xxt"), IMAGES, ["stages/9"]),
            "layer='stages/9': there is no attention there. Layers with attention: "
            "stages/0/blocks/0/attn, ",
        ),
        (
            lambda: analysis.grad_cam(tiny("gcvit_xxt"), IMAGES, layer="stage_3"),
            "layer='stage_3' is not there in this GCViT. Did you mean stage3",
        ),
        (
            lambda: analysis.grad_cam(tiny("gcvit_xxt"), IMAGES, 5),
            "classes=5: expected a whole number from 0 to 4, or one for each of 2 images",
        ),
        (
            lambda: analysis.grad_cam(tiny("gcvit_xxt"), reference.images(0, (1, 48, 48, 3))),
            "images are 48×48, but this GC ViT was built for image_size=32",
        ),
        (
            lambda: analysis.attention_maps(tiny("gcvit_xxt"), np.zeros((1, 32, 32, 3), np.uint8)),
            "images must be normalised floats, not uint8",
        ),
    ],
)
def test_what_cannot_be_shown_is_said(call, message):
    with pytest.raises(InputError, match=re.escape(message)):
        call()
