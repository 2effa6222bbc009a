"""What others rely on in every registered model; a violation is named in words."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import convert
import hybrid_flax
from hybrid_flax.distributed.shardings import model_rules
from hybrid_flax.models import registry
from hybrid_flax.models.backbone import Backbone
from hybrid_flax.models.structure import Structure
from hybrid_flax.weights import bridge
from hybrid_flax.weights.functions import (
    as_function,
    as_recording_function,
    as_training_function,
)
from tests.abstract import CLASSES, abstract, parameters, recorded

ALL = pytest.mark.parametrize("name", hybrid_flax.list_models())
# One of each kind: what the class decides, the variant cannot.
KINDS = sorted(
    {type(abstract(name, tiny=True)): name for name in hybrid_flax.list_models()}.values()
)


@ALL
def test_every_parameter_lies_in_one_part_of_the_structure(name):
    structure, variant = abstract(name, tiny=True).structure, hybrid_flax.model_variant(name)
    for path in parameters(name, tiny=True):
        structure.part(path)  # raises, naming the parameter
    numbers = structure.layer_ids(parameters(name, tiny=True))
    blocks = {structure.block(path) for path in numbers} - {None}
    assert set(numbers.values()) == set(range(max(numbers.values()) + 1)), "a layer is empty"
    if hasattr(variant, "depths"):
        depths = registry.tiny_model(name)["depths"]
        assert len(blocks) == sum(depths), f"{len(blocks)} blocks, depths={depths}"


@ALL
def test_the_classifier_is_all_that_is_as_wide_as_the_classes(name):
    structure = abstract(name, tiny=True).structure
    for path, leaf in parameters(name, tiny=True).items():
        as_wide = CLASSES in leaf.shape
        assert structure.is_classifier(path) == as_wide, (
            f"{path} {leaf.shape}: the classifier must be all layers as wide as the classes"
        )


@ALL
def test_the_tensor_axis_splits_the_mlps(name):
    structure = abstract(name, tiny=True).structure
    columns, _, rows, *_ = model_rules(structure)
    kernels = [f"params/{path}" for path in parameters(name, tiny=True)]
    first, second = (
        {p for p in kernels if re.search(pattern, p)} for pattern, _ in (columns, rows)
    )
    assert first, f"nothing matches split_columns={structure.split_columns!r}"
    assert len(first) == len(second), f"{len(first)} first matrices of MLPs, {len(second)} second"
    parents = [{path.rsplit("/", 2)[0] for path in paths} for paths in (first, second)]
    assert parents[0] == parents[1], "an MLP whose matrices are not both split"


@ALL
def test_maps_are_named_as_others_read_them_and_have_the_models_dtype(name):
    (found, _), model = recorded(name, "bfloat16"), abstract(name, tiny=True)
    assert "logits" in found, "intermediates gives no map called logits"
    assert (found["logits"].shape, found["logits"].dtype) == ((2, CLASSES), jnp.float32)
    pooled = [key for key in found if key.startswith("pooled")]
    assert pooled, "no map's name begins with `pooled`: hybrid_flax.knn reads those"
    missing = set(model.feature_maps) - set(found)
    assert not missing, f"feature_maps names {missing}, which intermediates does not have"
    strides = [model.image_size // found[key].shape[1] for key in model.feature_maps]
    assert strides in ([4, 8, 16, 32], [16])
    for key in (*model.feature_maps, model.dense_map or model.feature_maps[0]):
        assert found[key].dtype == jnp.bfloat16, (
            f"{key} is {found[key].dtype} in a bfloat16 model: something within returns float32"
        )


@ALL
def test_a_bfloat16_models_blocks_give_bfloat16(name):
    structure, (maps, outputs) = abstract(name, tiny=True).structure, recorded(name, "bfloat16")
    blocks = {path: leaf for path, leaf in outputs.items() if structure.is_block(path)}
    # GLNet's give their maps, too, which carry their names.
    blocks |= {key: leaf for key, leaf in maps.items() if key.endswith("_out")}
    assert blocks, "no block gave an array"
    wrong = {path: leaf.dtype for path, leaf in blocks.items() if leaf.dtype != jnp.bfloat16}
    assert not wrong, f"blocks that do not give the model's dtype: {wrong}"


@pytest.mark.parametrize("name", KINDS)
def test_blocks_are_rematerialised(name):
    model = abstract(name, tiny=True)
    weights = bridge.get_weights(model)
    images = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
    traced = jax.make_jaxpr(as_training_function(model, "blocks"))(weights, images)
    found = sum(equation.primitive.name == "remat2" for equation in traced.eqns)
    blocks = [
        path
        for path, _ in nnx.iter_modules(model)
        if model.structure.is_block("/".join(map(str, path)))
    ]
    assert found == len(blocks) > 0


@ALL
def test_recipes_find_a_drop_path_rate(name):
    assert 0 <= hybrid_flax.model_variant(name).drop_path < 1


@ALL
def test_every_parameter_has_one_key_of_the_release(name):
    model = abstract(name, tiny=True)
    widths = convert.state_dict.classifier_width(model, {})
    assert widths == CLASSES
    assert len(convert.state_dict.layer_names(model)) > 3


@ALL
def test_it_says_where_it_comes_from(name):
    info = hybrid_flax.model_info(name)
    assert info.top1 is None or 72 < info.top1 < 90
    assert info.gflops is None or 0.5 < info.gflops < 250
    assert (info.top1 is None) == (info.gflops is None)
    assert info.licence
    assert info.release_page.startswith("https://")
    assert not info.download_url or info.download_url.endswith(info.release_file)
    assert info.eval_transform.crop_mode in ("center", "squash")


@pytest.mark.parametrize("name", KINDS)
def test_unusable_images_are_refused(name):
    model = abstract(name, tiny=True)
    apply, weights = as_function(model), bridge.get_weights(model)
    side = model.image_size
    images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    with pytest.raises(ValueError, match="train=True needs key="):
        jax.eval_shape(lambda w, x: apply(w, x, train=True), weights, images)
    for shape in ((2, 3, side, side), (side, side, 3), (2, side, side, 1)):
        with pytest.raises(ValueError, match=r"images must be \[B, H, W, 3\].*got shape \("):
            jax.eval_shape(apply, weights, jax.ShapeDtypeStruct(shape, jnp.float32))


@pytest.mark.parametrize("name", KINDS)
def test_places_have_logits_or_the_model_says_that_it_has_none(name):
    model = abstract(name, tiny=True)
    images = jax.ShapeDtypeStruct((2, model.image_size, model.image_size, 3), jnp.float32)
    dense = functools.partial(as_function(model), method="dense_logits")
    if not model.dense_map:
        with pytest.raises(ValueError, match="has no logits of places: its classifier reads"):
            jax.eval_shape(dense, bridge.get_weights(model), images)
        return
    found = jax.eval_shape(dense, bridge.get_weights(model), images)
    side = model.image_size // 32
    assert (found.shape, found.dtype) == ((2, side, side, CLASSES), jnp.float32)


class Inherited(nnx.Module):
    def __init__(self):
        self.scale = nnx.Param(jnp.ones(3))

    def __call__(self, x):
        return x * self.scale[...][None, None, None]


class Block(Inherited):
    """Has no call of its own."""


class Louder(Block):
    def __call__(self, x):
        return super().__call__(x) + 1


class Toy(Backbone):
    structure = Structure(stem=r"stem/", blocks=r"layers/(\d+)/", end=r"head/")

    def __init__(self):
        self.layers = nnx.List([Block(), Louder()])
        self.image_size = 4
        self.num_classes = 1

    def intermediates(self, images, *, train=False, key=None):
        x = images
        for layer in self.layers:
            x = layer(x)
        return {"logits": x.mean((1, 2))}


def test_blocks_may_have_any_name_and_inherit_their_call():
    model = Toy()
    images = jnp.ones((2, 4, 4, 3))
    weights = bridge.get_weights(model)
    traced = jax.make_jaxpr(as_training_function(model, "blocks"))(weights, images)
    assert sum(equation.primitive.name == "remat2" for equation in traced.eqns) == 2
    _, outputs = as_recording_function(model)(weights, images)
    assert outputs.keys() == {"layers/0", "layers/1"}
    assert float(outputs["layers/1"][1].mean()) == 2
    assert "__call__" not in vars(Block)


def test_a_parameter_without_a_part_is_named():
    with pytest.raises(ValueError, match="parameter neck/kernel lies in no part of the model's"):
        Toy.structure.layer_ids(["layers/0/scale", "neck/kernel"])
    both = Toy.structure._replace(stem=r"layers/0/")
    with pytest.raises(ValueError, match="layers/0/scale lies in stem and blocks of the model's"):
        both.layer_ids(["layers/0/scale"])


def test_a_classifier_is_known_in_every_collection():
    structure = abstract("ga_vit_s", tiny=True).structure
    assert structure.is_classifier("ema/params/heads/2/classifier/kernel")
    assert not structure.is_classifier("params/heads/2/embedding/kernel")
    assert not structure.is_classifier("scale")  # optimizers pass paths of one part


def test_the_old_name_of_the_implementation_is_read():
    tiny = registry.tiny_model("gcvit_xxt")
    with pytest.warns(FutureWarning, match="is now create_model.implementation=…"):
        model = bridge.abstract(
            lambda: hybrid_flax.create_model("gcvit_xxt", attention="xla", **tiny)
        )
    assert model.stages[0].blocks[0].attn.implementation == "xla"
    with pytest.raises(ValueError, match="glnet_4g has no operation with kernels to choose for"):
        hybrid_flax.create_model("glnet_4g", implementation="pallas")
    with pytest.raises(
        ValueError, match="implementation='cuda': expected one of auto, pallas, xla"
    ):
        hybrid_flax.create_model("gcvit_xxt", implementation="cuda")
