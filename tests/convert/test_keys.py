"""Names of weights: prefixes of wrappers, timm's, and the image size that tables tell."""

import functools
import hashlib
import re

import numpy as np
import pytest

import convert
import hybrid_flax
from convert import gcvit, state_dict
from convert.keys import code_base, release_keys
from convert.state_dict import own_image_size, release_state
from hybrid_flax.errors import InputError
from hybrid_flax.models.gcvit import GCViT
from hybrid_flax.weights import bridge
from tests import reference

TINY = {"num_classes": 7, "image_size": 64, "dim": 32, "depths": (1, 2, 1, 1)}


@pytest.fixture(scope="module")
def model():
    return reference.model("gcvit_s", **TINY)


@pytest.fixture(scope="module")
def state(model):
    return convert.to_state_dict(model)


def loaded(state):
    copy = bridge.abstract(lambda: hybrid_flax.create_model("gcvit_s", **TINY))
    convert.load_state_dict(copy, state)
    return convert.to_state_dict(copy)


def assert_same(got, want):
    assert got.keys() == want.keys()
    assert all(got[key].tobytes() == want[key].tobytes() for key in want)


def with_prefix(state, prefix):
    return {prefix + key: array for key, array in state.items()}


@pytest.mark.parametrize("prefix", ["_orig_mod.module.", "model.", "ema_model.module."])
def test_a_prefix_that_all_keys_have_is_taken_off(state, capsys, prefix):
    assert_same(loaded(with_prefix(state, prefix)), state)
    assert capsys.readouterr().out == f"the prefix {prefix!r} was taken off the keys\n"


def test_what_has_no_part_in_the_model_is_left_out(state, capsys):
    file = with_prefix(state, "module.") | {
        "n_averaged": np.array(3),
        "module.levels.0.total_ops": np.zeros(1),
        "criterion.weight": np.ones(3, np.float32),
    }
    assert_same(loaded(file), state)
    assert "left out as no part of the model: criterion.weight" in capsys.readouterr().out


def test_a_wrapper_may_have_the_classifier_itself(state):
    trunk = {key: array for key, array in state.items() if not key.startswith("head.")}
    head = {key: array for key, array in state.items() if key.startswith("head.")}
    assert_same(loaded(with_prefix(trunk, "backbone.") | head), state)


def test_averaged_weights_beside_raw_ones_are_left_alone(state, capsys):
    averaged = {key: array + 1 for key, array in with_prefix(state, "ema.").items()}
    assert_same(loaded(with_prefix(state, "model.") | averaged), state)
    assert "the prefix 'model.' was taken off" in capsys.readouterr().out
    assert_same(loaded(state | averaged), state)


def test_two_models_are_named_by_their_prefixes(state):
    both = with_prefix(state, "left.") | with_prefix(state, "right.")
    with pytest.raises(InputError, match=r"2 models, under the prefixes 'left.', 'right.': .*left"):
        loaded(both)


def test_a_prefix_is_named_where_the_rest_does_not_fit(state):
    broken = with_prefix(state, "model.")
    del broken["model.norm.bias"]
    with pytest.raises(InputError) as error:
        loaded(broken)
    assert "(the prefix 'model.' was taken off the keys)" in str(error.value)
    assert "1 missing from the checkpoint:\n    norm.bias" in str(error.value)
    assert len(str(error.value).splitlines()) < 10


def timm_names(model):
    """{key of the release: timm's}, of all that has a place in the model."""
    found = {}
    for key in state_dict._table(model):
        found[key] = key
        for pattern, replacement in gcvit.RULES[GCViT].timm:
            found[key] = re.sub(pattern, replacement, found[key])
    return found


def as_convolution(theirs, shape):
    """timm's squeeze-and-excite layers are 1×1 convolutions."""
    return (*shape, 1, 1) if ".se.fc" in theirs else tuple(shape)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_timms_weights_are_read(model, state, capsys, prefix):
    theirs = {
        prefix + name: state[key].reshape(as_convolution(name, state[key].shape))
        for key, name in timm_names(model).items()
    }
    assert_same(loaded(theirs), state)
    assert "these are timm's weights, whose names were translated" in capsys.readouterr().out


# SHA-256 of timm 1.0.31's names and shapes, "name (shape)" by line, sorted.
TIMM = {
    "gcvit_xxt": "b984a9826425711f",
    "gcvit_xt": "e149885fbfdfe361",
    "gcvit_t": "37eb4bfb04346d8e",
    "gcvit_s": "24f8a51d924ce955",
    "gcvit_b": "6b91b8638ed60937",
}


@pytest.mark.parametrize(
    "name",
    [n if n == "gcvit_xxt" else pytest.param(n, marks=pytest.mark.slow) for n in TIMM],
)
def test_the_names_are_timms_of_every_size(name):
    model = bridge.abstract(lambda: hybrid_flax.create_model(name))
    shapes = {key: entry.shape for key, entry in state_dict._table(model).items()}
    names = timm_names(model)
    lines = sorted(f"{names[key]} {as_convolution(names[key], shapes[key])}" for key in shapes)
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == TIMM[name]


@pytest.mark.parametrize(
    ("keys", "whose"),
    [
        (["stages.0.global_block.blocks.conv1.conv_dw.weight"], "timm's weights of GC ViT"),
        (["stem.0.weight", "stages.0.blocks.0.conv_dw.weight"], "timm's weights of ConvNeXt"),
        (["patch_embed.proj.bias", "layers.0.blocks.0.attn.qkv.bias"], "timm's weights of Swin"),
        (["module.cls_token", "module.blocks.0.attn.qkv.bias"], "timm's weights of ViT"),
        (["layer1.0.conv1.weight", "bn1.bias"], "timm's or torchvision's weights of ResNet"),
        (["features.0.0.weight", "head.bias"], "torchvision's weights"),
        (["vit.encoder.layer.0.output.bias"], "weights of Hugging Face's transformers"),
        (["something.else"], ""),
    ],
)
def test_weights_of_other_code_are_named(keys, whose):
    assert code_base(keys) == whose


def test_weights_of_other_code_are_refused_in_a_few_lines():
    model = bridge.abstract(lambda: hybrid_flax.create_model("unified_swin_micro"))
    keys = [f"layers.{i}.blocks.{j}.attn.qkv.weight" for i in range(4) for j in range(20)]
    swin = {key: np.zeros(3) for key in [*keys, "patch_embed.proj.weight"]}
    with pytest.raises(InputError, match="None of its keys is known: these are timm's weights of "):
        convert.load_state_dict(model, swin)
    with pytest.raises(InputError) as error:
        convert.load_state_dict(model, swin)
    assert len(str(error.value).splitlines()) < 15


def test_keys_that_are_known_are_left_as_they_are():
    shapes = {"norm.weight": (2,), "blocks.norm.weight": (2,)}
    state = {key: np.zeros(2) for key in (*shapes, "extra")}
    assert release_keys(state, shapes).state == state
    assert release_keys({"x": np.zeros(1)}, shapes).note == ""


# The shapes of windows, of maps, of the masks of shifted windows; glnet has none.
@pytest.mark.parametrize(
    ("name", "overrides", "sizes"),
    [
        ("gcvit_xxt", {}, (64, 96)),
        ("unified_pvt_micro", {}, (256,)),
        pytest.param(
            "unified_swin_micro", {"depths": (2, 1, 1, 1)}, (448,), marks=pytest.mark.slow
        ),
        pytest.param("ga_vit_s", {}, (64,), marks=pytest.mark.slow),
        pytest.param("glnet_stl", {}, (224,), marks=pytest.mark.slow),
    ],
)
def test_the_image_size_is_that_of_the_tables(name, overrides, sizes):
    small = hybrid_flax.models.registry.tiny_model(name) | overrides

    @functools.cache
    def build(size):
        options = small | {"image_size": size}
        return bridge.abstract(lambda: hybrid_flax.create_model(name, **options))

    for size in sizes:
        buffers = state_dict._rules(build(size)).derived_buffers(build(size))
        table = state_dict._table(build(size))
        state = {key: np.zeros(entry.shape) for key, entry in table.items()} | dict(buffers)
        assert own_image_size(build(224), state, build) == size


def test_a_table_of_another_model_tells_no_size(model):
    state = {key: np.zeros(entry.shape) for key, entry in state_dict._table(model).items()}
    state["levels.0.blocks.0.attn.relative_position_bias_table"] = np.zeros((10, 1))
    asked = []

    def build(size):
        asked.append(size)
        raise InputError("no such size")

    assert own_image_size(model, state, build) == 64
    assert len(asked) < 10


def test_release_keys_are_what_verify_compares(model, state):
    assert_same(release_state(model, with_prefix(state, "module.")), state)


@pytest.mark.parametrize(
    ("name", "small"),
    [
        ("gcvit_xxt", {"image_size": 64, "dim": 32, "depths": (1, 1, 1, 1)}),
        ("ga_vit_s", {"depth": 2}),
        ("glnet_4g_tklb", {"depths": (1, 1, 1, 1)}),
    ],
)
def test_a_model_without_a_classifier_takes_none(name, small, capsys):
    state = convert.to_state_dict(reference.model(name, num_classes=5, **small))
    features = reference.model(name, num_classes=0, seed=1, **small)
    convert.load_state_dict(features, state)
    assert "the classifier is left out, for num_classes=0: " in capsys.readouterr().out
    for key, array in convert.to_state_dict(features).items():
        np.testing.assert_array_equal(array, state[key])
    with pytest.raises(InputError, match="1 only in the checkpoint:\n    neck.weight"):
        convert.load_state_dict(features, state | {"neck.weight": np.zeros(3, np.float32)})
