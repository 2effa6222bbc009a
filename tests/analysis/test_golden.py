"""Whole models beside what the authors' code gave: see tests/analysis/golden.py."""

import numpy as np
import pytest

from hybrid_flax import analysis
from hybrid_flax.analysis.cam import shown
from hybrid_flax.analysis.receptive_field import area_ratios, logarithmic
from hybrid_flax.analysis.sampling import spread
from tests.analysis import golden
from tests.reference import samples

pytestmark = pytest.mark.slow
ATTENTION = sorted({case["model"] for case in golden.META["attention"]})


@pytest.mark.parametrize("name", ATTENTION)
def test_attention(name):
    maps = analysis.attention_maps(golden.model(name), golden.views("flower.jpg"))
    for case in golden.META["attention"]:
        if case["model"] != name:
            continue
        label = case["label"]
        (path,) = (path for path in maps if path.startswith(golden.block(label) + "/"))
        got = maps[path]
        if case.get("kind") != "linear":
            assert list(got.shape) == case["shape"]
            np.testing.assert_allclose(
                samples(got, 512), golden.ARRAYS[f"{label}:samples"], atol=1e-5
            )
            continue
        want = golden.ARRAYS[f"{label}:row_sums"]
        np.testing.assert_allclose(samples(got.sum(-1), 256), want, atol=1e-5)
        if f"{label}:weights" in golden.ARRAYS:
            want = golden.ARRAYS[f"{label}:weights"]
            np.testing.assert_allclose(got[0][:, case["queries"]], want, atol=1e-5)


def test_slots():
    model, images = golden.model("glnet_stl", tame=True), golden.views("flower.jpg", "china.jpg")
    found = analysis.slots(model, images)["stages/2/blocks/0/mixer"]
    assert found.shape == (2, 64, 14, 14)
    np.testing.assert_allclose(samples(found, 1024), golden.ARRAYS["slots/soft_samples"], atol=1e-5)
    largest = np.sort(found, axis=1)
    clear = largest[:, -1] - largest[:, -2] > 1e-5
    assert (found.argmax(1) == golden.ARRAYS["slots/argmax"])[clear].all()


def test_sampling_points():
    found = analysis.sampling_points(
        golden.model("unified_internimage_micro"), golden.views("flower.jpg")
    )
    for case in golden.META["sampling"]:
        points = found[f"{golden.block(case['label'])}/mixer"]
        for values, what in zip(points, ("xy_samples", "mask_samples"), strict=True):
            want = golden.ARRAYS[f"sampling/{case['label']}:{what}"]
            np.testing.assert_allclose(samples(values, len(want)), want, atol=1e-3)
        want = [case[f"{what}_px"] for what in ("mean_distance", "mask_weighted_distance")]
        assert spread(points)[:2] == pytest.approx(want, rel=1e-5)
        assert spread(points)[2:] == pytest.approx(
            [case["outside_share"], case["largest_distance_px"]], rel=1e-5
        )


def test_gramian_heads():
    model, images = golden.model("ga_convnext_t"), golden.views("flower.jpg")
    similarity = analysis.gramian_similarity(model, images)
    attention = analysis.attention_maps(model, images)
    assert list(attention) == [f"heads/{head}/attn" for head in range(5)]
    for head in range(5):
        np.testing.assert_allclose(
            similarity[f"heads/{head}"][0],
            golden.ARRAYS[f"gram/h{head}:similarity_to_middle"],
            atol=1e-4,
        )
        np.testing.assert_allclose(
            attention[f"heads/{head}/attn"][0, :, 0],
            golden.ARRAYS[f"gram/h{head}:class_attention"],
            atol=1e-5,
        )


LAYERS = {
    "stage_norms.3": "stage4",
    "stage_norms.2": "stage3",
    "conv_head": None,
    "norm": None,
    "levels.2.blocks.5": "stages.2.blocks.5",
}


@pytest.mark.parametrize("case", golden.META["cam"], ids=lambda case: case["label"])
def test_grad_cam(case):
    name, _, layer = case["label"].partition(":")
    images = golden.views("china.jpg", "flower.jpg")
    got = analysis.grad_cam(golden.model(name), images, case["classes"], LAYERS[layer])
    want = golden.ARRAYS[f"cam/{case['label']}:raw"]
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
    want = golden.ARRAYS[f"cam/{case['label']}:shown_samples"]
    np.testing.assert_allclose(samples(shown(got, 224, 224), 1024), want, atol=1e-4)


@pytest.mark.parametrize("case", golden.META["erf"], ids=lambda case: case["label"])
def test_effective_receptive_field(case):
    images = golden.squashed(case["image_size"], *case["photos"])
    got = analysis.effective_receptive_field(golden.model(case["model"]), images)
    error = np.abs(samples(got, 1024) - golden.ARRAYS[f"erf/{case['label']}:samples"])
    jumps = 0.02 if "internimage" in case["model"] else 0
    assert (error > 1e-4 * case["max"]).mean() <= jumps
    for scores, what in (
        (got, "area_ratio_of_the_scores_themselves"),
        (logarithmic(got), "area_ratio_official"),
        (logarithmic(1000 * got), "area_ratio_official_if_gradients_were_1000_times_larger"),
    ):
        for threshold, found in area_ratios(scores).items():
            assert abs(found[0] - case[what][str(threshold)][0]) <= 2
