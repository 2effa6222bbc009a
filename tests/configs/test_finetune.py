"""configs/finetune.py: its arguments, what it makes of them, and a run."""

import re

import jax
import pytest
from flax import nnx

from configs import finetune
from configs.arguments import parse_arguments
from hybrid_flax.build import build_model
from hybrid_flax.settings import from_config, replace
from hybrid_flax.training.optimizers import decayed, trainable
from hybrid_flax.weights import bridge
from hybrid_flax.weights.paths import flatten


def test_arguments_change_the_config():
    config = finetune.get_config(
        "model=gcvit_t,checkpoint=weights/t,dataset=image_folder,path=PETS,classes=37,"
        "image_size=256,batch_size=32,epochs=10"
    )
    assert config.is_locked
    assert (config.model.name, config.model.num_classes, config.model.image_size) == (
        *("gcvit_t", 37),
        256,
    )
    assert (config.init_from, config.dataset.path) == ("weights/t", "PETS")
    assert (config.batch_size, config.epochs, config.schedule.decay_epochs) == (32, 10, 10.0)
    assert config.schedule.warmup_epochs == 1.0
    assert finetune.get_config("checkpoint=none").init_from == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modle=gcvit_t", "no argument 'modle'. Did you mean 'model'? It takes model, checkpoint"),
        ("colour=red", "no argument 'colour'. It takes model, checkpoint"),
        ("model=gcvit_x", "unknown model 'gcvit_x'. Did you mean gcvit_x"),
        ("epochs=ten", "argument epochs=ten: expected a whole number"),
        ("probe=maybe", "argument probe=maybe: expected true or false"),
        ("epochs=3,epochs=4", "argument 'epochs' is given twice"),
    ],
)
def test_unusable_arguments_are_named(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        finetune.get_config(text)


def test_a_name_alone_means_yes():
    assert parse_arguments("a,b=x", {"a": False, "b": "", "c": 1}) == {"a": True, "b": "x", "c": 1}


@pytest.mark.parametrize(
    "name", ["gcvit_xxt", "glnet_4g_tklb", "ga_convnext_t", "unified_pvt_micro"]
)
@pytest.mark.parametrize("probe", ["", ",probe"])
def test_every_kind_of_model_can_be_tuned_and_probed(name, probe):
    config = finetune.get_config(f"model={name}{probe}")
    config = replace(from_config(config), {"model.num_classes": 10})
    model = bridge.abstract(lambda: build_model(config, rngs=nnx.Rngs(0)))
    params = bridge.get_weights(model)["params"]
    learns = flatten(trainable(params, config.optimizer))
    assert {path for path, yes in learns.items() if yes} == {
        path for path in learns if not probe or model.structure.is_classifier(path)
    }
    assert any(jax.tree.leaves(decayed(params, config.optimizer)))
