"""Which parameters escape weight decay, for every family: by the authors' rules, and by name."""

import re

import jax
import numpy as np
import pytest

import configs
import convert
import hybrid_flax
from hybrid_flax.training.optimizers import decayed
from hybrid_flax.weights import bridge

# The rules of the released programs, on names and shapes of the released checkpoints:
# timm's (GC ViT, token labelling, Gramian models) leaves out ranks 0 and 1, the others rank 1;
# all leave out `.bias` and the model's own list; GLNet's also `.gamma` and `.beta`.
TIMM = ("timm", (".bias",))
RANK1 = ("rank 1", (".bias",))
RULES = {
    "gcvit": TIMM,
    "l2vit": RANK1,
    "glnet": ("rank 1", (".bias", ".gamma", ".beta")),
    "tklb": TIMM,
    "ga": TIMM,
    "unified": RANK1,
    "swin": ("rank 1", (".bias", "relative_position_bias_table")),
}

# One of each kind of block. Beside matrices and kernels, which decay, and biases and norms, which
# do not: every other parameter, with "#" for a number, and whether it decays.
SPECIAL = {
    "gcvit_xxt": ("gcvit", {"levels.#.blocks.#.attn.relative_position_bias_table": True}),
    "gcvit_s": (
        "gcvit",
        {
            "levels.#.blocks.#.attn.relative_position_bias_table": True,
            "levels.#.blocks.#.gamma#": False,
        },
    ),
    "l2vit_t": ("l2vit", {"stages.#.#.attn.temperature": True}),
    "glnet_4g": ("glnet", {"stages.#.blocks.#.slot_scale": True}),
    "glnet_16g": (
        "glnet",
        {"stages.#.blocks.#.slot_scale": True, "stages.#.blocks.#.ls#.gamma": False},
    ),
    "glnet_stl": ("glnet", {"stages.#.blocks.#.slot_scale": True}),
    "glnet_stl_paramslot": (
        "glnet",
        {"stages.#.blocks.#.slot_scale": True, "stages.#.blocks.#.init_slots": True},
    ),
    "glnet_4g_tklb": ("tklb", {"stages.#.blocks.#.slot_scale": False}),
    "ga_convnext_t": (
        "ga",
        {
            "ga.#.gamma_#": False,
            "gram_layer.#.blocks.#.gamma": False,
            "stages.#.blocks.#.gamma": False,
        },
    ),
    "ga_cswin_t": ("ga", {"ga.#.gamma_#": False}),
    "ga_resnet50": ("ga", {"ga.#.gamma_#": False}),
    "ga_vit_s": ("ga", {"ga.#.gamma_#": False, "pos_embed": False}),
    "unified_halonet_micro": (
        "unified",
        {
            "stages.#.#.gamma_#": True,
            "stages.#.#.attn.pos_embed.height_rel": True,
            "stages.#.#.attn.pos_embed.width_rel": True,
        },
    ),
    "unified_pvt_micro": (
        "unified",
        {"stages.#.#.gamma_#": False, "stages.#.#.pos_embed": True},
    ),
    "unified_swin_micro": (
        "swin",
        {
            "stages.#.#.gamma_#": False,
            "stages.#.#.attn.relative_position_bias_table": False,
        },
    ),
    "unified_convnext_micro": ("unified", {"stages.#.#.gamma_#": True}),
    "unified_internimage_micro": ("unified", {"stages.#.#.gamma#": False}),
}


def by_released_name(name):
    """{name in the release: (its shape there, whether it decays in our config)}"""
    model = bridge.abstract(lambda: hybrid_flax.create_model(name))
    weights = bridge.get_weights(model)
    config = configs.load(name)
    flags = decayed(weights["params"], config.optimizer)
    params = jax.tree.map(
        lambda leaf, flag: np.broadcast_to(np.float32(flag), leaf.shape), weights["params"], flags
    )
    statistics = jax.tree.map(
        lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), weights.get("batch_stats", {})
    )
    bridge.set_weights(model, {"params": params, "batch_stats": statistics})
    state = convert.to_state_dict(model)
    buffers = ("running_mean", "running_var", "num_batches_tracked", "attn_mask")
    return {
        key: (array.shape, bool(array.flat[0]))
        for key, array in state.items()
        if not key.endswith(buffers) and array.dtype.kind == "f"
    }


@pytest.mark.parametrize("name", SPECIAL)
def test_what_decays_is_what_the_authors_decay(name):
    rule, special = SPECIAL[name]
    kind, never = RULES[rule]
    found = {}
    for key, (shape, decays) in by_released_name(name).items():
        if key != "pos_embed":  # of GA-ViT-S, which has no official code
            low_rank = len(shape) <= 1 if kind == "timm" else len(shape) == 1
            assert decays == (not low_rank and not key.endswith(never)), (key, shape)
        if not key.endswith(("weight", "bias")):
            found.setdefault(re.sub(r"\d+", "#", key), set()).add(decays)
    assert found == {key: {decays} for key, decays in special.items()}
