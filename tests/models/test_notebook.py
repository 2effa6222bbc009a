"""What people do with a model in a notebook, for every family; and afterwards it still works."""

import copy
import functools
import pickle
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hybrid_flax
from hybrid_flax.errors import InputError
from hybrid_flax.layers.inputs import check_images
from hybrid_flax.models import registry
from hybrid_flax.weights import bridge
from hybrid_flax.weights.functions import as_function

NAMES = (
    "gcvit_xxt",
    "l2vit_t",
    "glnet_4g",
    "glnet_4g_tklb",
    "ga_convnext_t",
    "ga_cswin_t",
    "ga_resnet50",
    "ga_vit_s",
    *(f"unified_{mixer}_micro" for mixer in ("halonet", "pvt", "swin", "convnext", "internimage")),
)
EACH = pytest.mark.parametrize("name", NAMES)
QUICK = ("ga_resnet50", "unified_pvt_micro", "unified_convnext_micro")


def abstract(name, **fields):
    fields = registry.tiny_model(name) | {"num_classes": 5} | fields
    return bridge.abstract(lambda: hybrid_flax.create_model(name, **fields))


@functools.cache
def filled(name):
    """A tiny model whose weights are there, without the time to draw them."""
    model = abstract(name)
    weights = bridge.get_weights(model)
    bridge.set_weights(model, jax.tree.map(lambda x: jnp.full(x.shape, 0.01, x.dtype), weights))
    return model


def images(model, batch=2):
    return jnp.ones((batch, model.image_size, model.image_size, 3))


def shape(model):
    """Of what the model gives; nothing is computed."""
    return nnx.eval_shape(lambda model, x: model(x), model, images(model)).shape


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES],
)
def test_a_model_is_tabulated_shown_copied_and_switched_and_works_afterwards(name, capsys):
    model = filled(name)
    assert "Total" in nnx.tabulate(model, images(model))
    nnx.display(model)
    assert capsys.readouterr().out
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert shape(other) == (2, 5)
    model.train()
    assert shape(model) == (2, 5)
    model.eval()
    assert shape(model) == (2, 5)
    one = jax.eval_shape(jax.vmap(lambda x: model(x[None])[0]), images(model))
    assert one.shape == (2, 5)


@EACH
def test_no_module_has_a_static_method(name):  # Flax wraps them as if they took the module
    kinds = {type(part) for _, part in nnx.iter_modules(filled(name))}
    for kind in kinds:
        if kind.__module__.startswith("hybrid_flax"):
            found = [key for key, value in vars(kind).items() if isinstance(value, staticmethod)]
            assert not found, f"{kind.__name__}: {found}"


@EACH
def test_a_model_is_summarised_on_one_screen(name):
    lines = repr(filled(name)).splitlines()
    assert 4 <= len(lines) <= 24
    assert max(map(len, lines)) <= 100
    counted = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(filled(name), nnx.Param)))
    assert f"{counted:,} parameters, images" in lines[0]
    assert str(filled(name)) == repr(filled(name))


@EACH
def test_a_model_without_classes_gives_features(name):
    model = abstract(name, num_classes=0)
    weights = bridge.get_weights(model)
    assert not [path for path in weights["params"] if model.structure.is_classifier(f"{path}/")]
    found = jax.eval_shape(as_function(model), weights, images(model))
    assert (len(found.shape), found.dtype) == (2, jnp.float32)
    maps = jax.eval_shape(
        functools.partial(as_function(model), method="features"), weights, images(model)
    )
    assert len(maps) == len(model.feature_maps)
    with pytest.raises(InputError, match="built with num_classes=0 and has no classifier"):
        model.dense_logits(images(model))


SQUARE = {
    "gcvit_xxt": "GC ViT",
    "unified_pvt_micro": "mixer pvt",
    "unified_swin_micro": "mixer swin",
}


@EACH
def test_a_pair_is_taken_or_the_family_says_that_it_cannot(name):
    side = registry.tiny_model(name)["image_size"]
    if name in SQUARE:
        with pytest.raises(
            InputError, match=rf"image_size=\({side}, .*{SQUARE[name]} is built for"
        ):
            abstract(name, image_size=(side, 2 * side))
        return
    model = abstract(name, image_size=(side, 2 * side))
    pictures = jax.ShapeDtypeStruct((2, side, 2 * side, 3), jnp.float32)
    found = jax.eval_shape(as_function(model), bridge.get_weights(model), pictures)
    assert found.shape == (2, 5)
    assert abstract(name, image_size=[np.int64(side)] * 2).image_size == side


def test_the_version_is_that_of_the_package():
    from importlib import metadata

    try:
        installed = metadata.version("hybrid_flax")
    except metadata.PackageNotFoundError:
        pytest.skip("hybrid_flax is not installed here, only its requirements")
    assert hybrid_flax.__version__ == installed


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"dtype": "float99"}, "dtype='float99': expected one of bfloat16, float16, float32"),
        ({"dtype": None}, "dtype=None: expected"),
        ({"dtype": np.int32}, "expected one of bfloat16"),
        ({"dtype": "float64"}, "dtype='float64': expected"),
        ({"image_size": True}, "image_size=True: expected"),
        ({"num_classes": True}, "num_classes=True: expected"),
        ({"rngs": 0}, "rngs=int: expected nnx.Rngs"),
        ({"rngs": nnx.Rngs(dropout=0)}, r"a stream 'params'.* nnx.Rngs\(0\)"),
        ({"name": "x" * 5000}, "^unknown model 'x{80}'"),
    ],
)
def test_an_argument_of_another_kind_is_refused_by_name(argument, message):
    with pytest.raises(InputError, match=message):
        hybrid_flax.create_model(**{"name": "unified_convnext_micro"} | argument)


def test_numbers_of_numpy_are_numbers():
    model = abstract("unified_convnext_micro", num_classes=np.array([3, 6]).max() + 1)
    assert model.num_classes == 7
    assert type(model.num_classes) is int


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (jnp.zeros((1, 32, 32, 3), jnp.uint8), "normalised floats, not uint8: .*model_input"),
        (jnp.zeros((1, 32, 32, 3), bool), "normalised floats, not bool"),
    ],
)
def test_what_is_not_normalised_images_is_refused(given, message):
    with pytest.raises(InputError, match=message):
        abstract("unified_convnext_micro")(given)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((0, 64, 64, 3), np.float32), "at least one, got shape \\(0, 64, 64, 3\\)"),
        (
            types.SimpleNamespace(shape=(1, 64, 64, 3), dtype="torch.float32"),
            "of JAX or NumPy, not",
        ),
    ],
)
def test_images_that_no_model_takes_are_named(images, message):
    with pytest.raises(InputError, match=message):
        check_images(images)


def test_pretrained_is_no_file_and_names_are_in_lower_case():
    with pytest.raises(InputError, match="pretrained='x.pth': expected True or False. Weights of"):
        hybrid_flax.create_model(
            "gcvit_xxt", pretrained="x.pth", **registry.tiny_model("gcvit_xxt")
        )
    with pytest.raises(InputError, match="unknown model 'GCVIT_XXT'. Did you mean gcvit_xxt"):
        hybrid_flax.model_info("GCVIT_XXT")
