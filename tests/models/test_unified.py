import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import convert
import hybrid_flax
from hybrid_flax.layers import resize_position_map
from hybrid_flax.models import unified
from hybrid_flax.models.unified.mixer import Mixer, Place
from hybrid_flax.models.unified.model import Block, Stem
from hybrid_flax.weights import bridge
from hybrid_flax.weights.functions import as_function, as_training_function
from hybrid_flax.weights.paths import flatten
from tests import reference
from tests.parity import GOLDEN, golden_state

TINY = {"num_classes": 7, "depths": (1, 2, 1, 1)}

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def images(batch=2, height=64, width=64, seed=0):
    return jnp.asarray(reference.images(seed, (batch, height, width, 3)))


def abstract(family, **overrides):
    name = f"unified_{family}_micro"
    return bridge.abstract(lambda: hybrid_flax.create_model(name, **TINY | overrides))


def traced(model, height, width, method="intermediates"):
    """Shapes and dtypes of what the model would give for one image of this size."""
    apply = as_function(model)
    image = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
    return jax.eval_shape(
        lambda weights, x: apply(weights, x, method=method), bridge.get_weights(model), image
    )


def shapes(*arguments):
    return jax.tree.map(lambda leaf: leaf.shape, traced(*arguments))


# ----------------------------------------------------------- against the official code, in parts

MODULES = json.loads((GOLDEN / "stm_modules" / "modules.json").read_text())

PARTS = {
    **{f"block_{mixer}": (mixer, "stages.1.0.") for mixer in unified.MIXERS},
    "block_swin": ("swin", "stages.1.1."),
    "stem": ("convnext", "downsample_layers.0."),
    "downsample": ("convnext", "downsample_layers.1."),
    "stage_norm": ("convnext", "stage_norms.0."),
    "conv_head": ("convnext", "conv_head."),
}
FIND = {
    "stages.1.0.": lambda model: model.stages[1].blocks[0],
    "stages.1.1.": lambda model: model.stages[1].blocks[1],
    "downsample_layers.0.": lambda model: model.stem,
    "downsample_layers.1.": lambda model: model.stages[1].downsample,
    "stage_norms.0.": lambda model: model.stages[0].norm,
    "conv_head.": lambda model: functools.partial(model.conv_head, train=False),
}


@pytest.mark.parametrize("name", PARTS)
def test_part_agrees_with_the_official_code(name):
    """On inputs so small that the epsilon of every norm counts."""
    mixer, prefix = PARTS[name]
    record, golden = MODULES["modules"][name], np.load(GOLDEN / "stm_modules" / f"{name}.npz")
    model, seed = reference.model(f"unified_{mixer}_micro", **TINY), MODULES["weight_seed"]
    if mixer == "pvt":  # as if built for images whose second stage has maps of 14×14
        model.stages[1].blocks[0].mixer.position_map = nnx.Param(jnp.zeros((14, 14, 64)))
    state = convert.to_state_dict(model)
    for key, entry in record["weights"].items():
        values = reference.weights(seed, key, tuple(entry["shape"])) * np.float32(entry["scale"])
        assert state[prefix + key].shape == values.shape
        state[prefix + key] = values
    convert.load_state_dict(model, state)
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def run(params, x, cotangent):
        def forward(params, x):
            return FIND[prefix](nnx.merge(graph, params, rest))(x)

        out, gradients = jax.vjp(forward, params, x)
        return out, *gradients(cotangent)

    with jax.numpy_dtype_promotion("standard"):
        out, grads, grad_input = run(params, golden["input"], golden["cotangent"])
    for got, want in ((out, golden["out"]), (grad_input, golden["grad_input"])):
        got = reference.samples(np.asarray(got), want.size)
        assert np.linalg.norm(got - want) < 1e-5 * np.linalg.norm(want)
    nnx.update(model, grads)
    grads = convert.to_state_dict(model)
    for key, (norm, projection) in record["grads"].items():
        found = grads[prefix + key]
        assert np.linalg.norm(found) == pytest.approx(norm, rel=1e-4), key
        error = reference.projection(seed, key, found) - projection
        assert abs(error) < 1e-4 * norm, key


@pytest.mark.parametrize("detection", [False, True])
@pytest.mark.parametrize("mixer", unified.MIXERS)
def test_weights_go_in_and_out_under_the_official_names(mixer, detection):
    suffix = "_det_192x288" if detection else ""
    record = json.loads((GOLDEN / "stm" / f"unified_{mixer}_micro{suffix}.json").read_text())
    name = f"unified_{mixer}_micro"
    model = bridge.abstract(lambda: hybrid_flax.create_model(name, detection=detection))
    state = golden_state(record)
    convert.load_state_dict(model, state)
    exported = convert.to_state_dict(model)
    entries = {key: (list(array.shape), array.dtype) for key, array in exported.items()}
    derived = record["other_entries"]
    assert entries == {key: (list(a.shape), a.dtype) for key, a in state.items()} | {
        key: (shape, np.dtype(kind.removeprefix("torch.")))
        for key, (shape, kind) in derived.items()
    }
    assert all(np.array_equal(exported[key], array) for key, array in state.items())


def test_official_masks_are_checked_when_they_are_there():
    model = abstract("swin")
    state = convert.to_state_dict(reference.model("unified_swin_micro", **TINY))
    assert state["stages.1.1.attn_mask"].shape == (16, 49, 49)
    state["stages.1.1.attn_mask"] = np.zeros((16, 49, 49), np.float32)
    with pytest.raises(
        ValueError, match=r"1 of another shape or type:\n    stages.1.1.attn_mask: .* differs"
    ):
        convert.load_state_dict(model, state)


# ------------------------------------------------------------------------------------- the frame


def test_list_models():
    names = hybrid_flax.list_models("unified_*")
    sizes = ("micro", "tiny", "small", "base")
    assert names == sorted(f"unified_{mixer}_{size}" for mixer in unified.MIXERS for size in sizes)
    info = hybrid_flax.model_info("unified_pvt_base")
    assert (info.top1, info.weights_entry, info.licence) == (83.4, "model", "MIT")
    assert info.download_url.endswith("/releases/download/cls-ckpt/unified_pvt_base.pth")


@pytest.mark.parametrize("mixer", unified.MIXERS)
def test_intermediates_and_features(mixer):
    model = abstract(mixer, image_size=224)
    maps = shapes(model, 224, 224)
    stages = [f"stage{i}{part}" for i in range(1, 5) for part in ("_blocks", "")]
    assert set(maps) == {"stem", *stages, "conv_head", "pooled", "logits"}
    assert (maps["pooled"], maps["logits"]) == ((1, 384), (1, 7))
    dims = unified.VARIANTS[f"unified_{mixer}_micro"].dims
    want = [(1, 224 // 2**i, 224 // 2**i, dim) for i, dim in zip((2, 3, 4, 5), dims, strict=True)]
    assert shapes(model, 224, 224, "features") == want == [maps[f"stage{i}"] for i in range(1, 5)]


@pytest.mark.parametrize("mixer", unified.MIXERS)
def test_detection_trunk(mixer):
    model = abstract(mixer, detection=True)
    maps = shapes(model, 96, 160)
    stages = [f"{kind}{i}" for i in range(1, 5) for kind in ("stage", "out")]
    assert set(maps) == {"stem", *stages}
    assert shapes(model, 96, 160, "features") == [maps[f"out{i}"] for i in range(1, 5)]
    assert maps["out4"] == (1, 3, 5, 256)
    paths = flatten(bridge.get_weights(model))
    assert not [path for path in paths if "head" in path]
    with pytest.raises(ValueError, match="built with detection=True and has no classifier"):
        model(images())


@pytest.mark.parametrize(
    ("mixer", "built_for", "height", "width"),
    [
        ("halonet", 224, 221, 448),
        ("halonet", 222, 224, 224),
        ("pvt", 64, 61, 64),
        ("swin", 224, 221, 224),
        ("swin", 224, 448, 224),
        ("swin", 448, 224, 448),
        ("convnext", 50, 33, 70),
        ("internimage", 64, 32, 96),
    ],
)
def test_sizes_that_are_accepted(mixer, built_for, height, width):
    maps = shapes(abstract(mixer, image_size=built_for), height, width)
    assert maps["stage1"][1:3] == (-(-height // 4), -(-width // 4))


@pytest.mark.parametrize(
    ("mixer", "height", "width", "message"),
    [
        ("halonet", 220, 224, "220×224, but halo attention needs .* multiples of 224, or up to 3"),
        ("halonet", 112, 112, "112×112, but halo attention needs maps of whole 7×7 blocks"),
        ("pvt", 224, 220, "224×220, but .*image_size=224 .* from 221 to 224"),
        ("swin", 112, 112, r"112×112, but stage 4 would have a map of 4×4, .* whole 7×7 windows"),
        ("swin", 224, 225, r"224×225, but stage 1 would have a map of 56×57"),
        ("internimage", 224, 221, "224×221, but .* multiples of 32. Resize or pad"),
    ],
)
def test_sizes_that_are_refused_by_name(mixer, height, width, message):
    with pytest.raises(ValueError, match=message):
        abstract(mixer, image_size=224)(images(1, height, width))


@pytest.mark.parametrize(
    ("mixer", "size", "message"),
    [
        ("halonet", 256, "image_size=256: halo attention needs maps of whole 7×7 blocks"),
        ("pvt", 100, "image_size=100: PVT must be built for a multiple of 32"),
        ("swin", 112, "image_size=112: stage 4 would have a map of 4×4, .* whole 3×3 windows"),
        ("swin", 20, "image_size=20: stage 2 would have a map of 3×3, .* whole 2×2 windows"),
        ("internimage", 100, "image_size=100: the deformable convolution takes"),
        ("convnext", 0, "image_size=0: expected a whole number from 1"),
    ],
)
def test_sizes_that_no_model_is_built_for(mixer, size, message):
    with pytest.raises(ValueError, match=message):
        abstract(mixer, image_size=size)


def test_detection_takes_any_size_but_with_two_mixers():
    for mixer in ("halonet", "swin", "convnext", "pvt"):
        assert shapes(abstract(mixer, detection=True), 37, 50)["out1"] == (1, 10, 13, 32)
    with pytest.raises(ValueError, match="37×50, but the deformable convolution takes"):
        abstract("internimage", detection=True).features(images(1, 37, 50))
    with pytest.raises(ValueError, match="28×50, but the first stage of PVT needs 29 pixels"):
        abstract("pvt", detection=True).features(images(1, 28, 50))
    with pytest.raises(ValueError, match=r"must be \[B, H, W, 3\]"):
        abstract("convnext")(jnp.zeros((64, 64, 3)))


def test_a_new_mixer_is_one_class_and_one_line(monkeypatch):
    class Mean(Mixer):
        def __init__(self, dim, place, *, dtype, rngs):
            assert place.stage in range(4)

        def __call__(self, x):
            return jnp.broadcast_to(x.mean((1, 2), keepdims=True), x.shape)

    monkeypatch.setitem(unified.MIXERS, "mean", Mean)
    assert shapes(abstract("swin", mixer="mean"), 40, 50)["logits"] == (1, 7)
    with pytest.raises(ValueError, match="mixer='median': expected one of halonet, pvt"):
        abstract("swin", mixer="median")


@pytest.fixture(scope="module")
def tiny():
    return reference.model("unified_convnext_micro", **TINY | {"image_size": 64, "drop_path": 0.5})


@pytest.fixture(scope="module")
def run(tiny):
    """The tiny model, compiled: run(images, …) → (output, batch statistics)."""
    apply = jax.jit(as_training_function(tiny), static_argnames=("method", "train"))
    return functools.partial(apply, bridge.get_weights(tiny))


def test_training_drops_paths_by_key_and_moves_the_statistics(tiny, run):
    with pytest.raises(ValueError, match="train=True needs key="):
        tiny(images(), train=True)
    (first, stats), (again, _), (other, _) = (
        run(images(), train=True, key=jax.random.key(seed)) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.01
    before = flatten(bridge.get_weights(tiny)["batch_stats"])
    after = flatten(stats)
    assert int(after["conv_head/norm/count"]) == 1
    moved = np.abs(after["conv_head/norm/mean"] - before["conv_head/norm/mean"])
    assert moved.max() > 0.001
    _, unmoved = run(images())
    np.testing.assert_array_equal(
        unmoved["conv_head"]["norm"]["mean"], before["conv_head/norm/mean"]
    )


def test_drop_path_rates_rise_linearly_over_all_blocks(tiny):
    rates = [block.drop_path_rate for stage in tiny.stages for block in stage.blocks]
    np.testing.assert_allclose(rates, np.linspace(0, 0.5, 5))


@pytest.mark.parametrize("mixer", unified.MIXERS)
def test_blocks_compute_in_bfloat16_close_to_float32(mixer):
    model = reference.model(f"unified_{mixer}_micro", **TINY, detection=True)
    weights = nnx.state(model.stages[1].blocks[1])
    x = jnp.asarray(reference.images(0, (1, 10, 12, 64)))

    def output(dtype):
        block = abstract(mixer, detection=True, dtype=dtype).stages[1].blocks[1]
        graph, _ = nnx.split(block)
        return jax.jit(lambda weights, x: nnx.merge(graph, weights)(x))(weights, x.astype(dtype))

    with jax.numpy_dtype_promotion("standard"):  # Flax's LayerNorm mixes dtypes on purpose
        half, full = output(jnp.bfloat16), output(jnp.float32)
    assert half.dtype == jnp.bfloat16
    assert np.linalg.norm(half.astype(jnp.float32) - full) < 0.02 * np.linalg.norm(full)


@pytest.mark.parametrize("mixer", unified.MIXERS)
def test_bfloat16_is_the_dtype_of_all_maps_but_the_last(mixer):
    model = abstract(mixer, image_size=224, dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        maps = traced(model, 224, 224)
    wide = {name for name, leaf in maps.items() if leaf.dtype == jnp.float32}
    assert wide == {"pooled", "logits"}
    assert {maps[name].dtype for name in maps.keys() - wide} == {jnp.dtype(jnp.bfloat16)}


def test_a_mixer_without_kernels_has_no_choice():
    with pytest.raises(ValueError, match="'xla': the mixer convnext has no operation with kernels"):
        abstract("convnext", implementation="xla")
    block = abstract("halonet", implementation="xla").stages[0].blocks[0]
    assert block.mixer.implementation == "xla"


class PoolingMixer(Mixer):
    """README's example; `nnx.avg_pool` returns float32 for any input."""

    def __call__(self, x):
        return nnx.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False) - x


def test_a_mixer_that_widens_its_map_does_not_widen_the_blocks(monkeypatch):
    monkeypatch.setitem(unified.MIXERS, "pooling", PoolingMixer)
    model = abstract("convnext", mixer="pooling", image_size=32, dtype=jnp.bfloat16)
    with jax.numpy_dtype_promotion("standard"):
        maps = traced(model, 32, 32)
    assert {maps[f"stage{i}_blocks"].dtype for i in range(1, 5)} == {jnp.dtype(jnp.bfloat16)}


def test_initial_values():
    place = Place(stage=3, block=0, side=7, detection=False)

    @jax.jit
    def init():
        options = {"dtype": jnp.float32, "rngs": nnx.Rngs(1)}
        halonet, pvt, swin, _, internimage = (
            mixer(64, place, **options) for mixer in unified.MIXERS.values()
        )
        block = Block(Mixer, 64, place, mlp_ratio=4, drop_path_rate=0.0, **options)
        drawn = {
            "row_table": halonet.row_table[...],
            "position_map": pvt.position_map[...],
            "position_bias": swin.position_bias[...],
            "offsets": internimage.offsets.kernel[...],
            "depthwise": internimage.depthwise.kernel[...],
            "stem": Stem(64, **options).conv1.kernel[...],
        }
        zeros = internimage.offsets.bias[...], internimage.depthwise.bias[...]
        return drawn, zeros, (block.gamma1[...], block.gamma2[...])

    drawn, zeros, gammas = init()
    # Offsets too: unlike InternImage's they do not start at 0, the authors overwrite that.
    want = dict.fromkeys(drawn, 0.02) | {"row_table": 32**-0.5}
    assert {name: float(array.std()) for name, array in drawn.items()} == pytest.approx(
        want, rel=0.1
    )
    assert not any(array.any() for array in zeros)
    assert all((gamma == np.float32(1e-6)).all() for gamma in gammas)


# ------------------------------------------------------------------------------------ the mixers


def test_swin_shifts_every_other_block_but_not_in_a_single_window():
    def shifts(**overrides):
        model = abstract("swin", depths=(2, 1, 1, 2), image_size=224, **overrides)
        return [(b.mixer.window, b.mixer.shift) for s in model.stages for b in s.blocks]

    assert shifts() == [(7, 0), (7, 3), (7, 0), (7, 0), (7, 0), (7, 0)]
    assert shifts(detection=True)[-1] == (7, 3)


def test_pvt_has_a_position_map_for_each_stage_in_its_first_block():
    flat = flatten(bridge.get_weights(abstract("pvt", image_size=64)))
    maps = {path: leaf.shape for path, leaf in flat.items() if path.endswith("position_map")}
    assert maps == {
        f"params/stages/{i}/blocks/0/mixer/position_map": (16 >> i, 16 >> i, dim)
        for i, dim in enumerate((32, 64, 160, 256))
    }


def test_position_maps_are_resized_with_their_corners_in_place():
    square = jnp.arange(9.0).reshape(3, 3, 1)
    wide = resize_position_map(square, 2, 5)[..., 0]
    np.testing.assert_allclose(wide, [[0, 0.5, 1, 1.5, 2], [6, 6.5, 7, 7.5, 8]], atol=1e-6)
    assert resize_position_map(square, 1, 1).tolist() == [[[0.0]]]
