"""Gramian attention models: our parameter paths → keys of the official state_dict, by trunk.

GA-ResNet50 and GA-ViT-S have no official code: their trunks' keys are timm's for ResNet and ViT,
stage 5 and heads have those of the other two.
"""

from convert.official import Official
from convert.rules import Rules
from hybrid_flax.models.gramian import GAConvNeXt, GACSWin, GAResNet, GAViT
from hybrid_flax.models.gramian.cswin import VARIANTS

_HEADS = (
    (r"^trunk/", ""),
    (r"^heads/(\d+)/contraction/", r"gram_contraction/\1/0/"),
    (r"^heads/(\d+)/contraction_norm/", r"gram_contraction/\1/1/"),
    (r"^heads/(\d+)/embedding/", r"gram_embedding/\1/0/"),
    (r"^heads/(\d+)/embedding_norm/", r"gram_embedding/\1/1/"),
    (r"^heads/(\d+)/classifier/", r"fc/\1/"),
    (r"^heads/(\d+)/gram_layer/", r"gram_layer/\1/"),
    (r"^heads/(\d+)/gamma(\d)", r"ga/\1/gamma_\2"),
    (r"^heads/", "ga/"),
)
_BOTTLENECK = (
    (r"/shortcut/", "/downsample/0/"),
    (r"/shortcut_norm/", "/downsample/1/"),
    (r"/se/reduce/", "/se/fc1/"),
    (r"/se/expand/", "/se/fc2/"),
    (r"^stage5/norm(\d)/", r"stage5/bn\1/"),
)

_CONVNEXT = Rules(
    renames=(
        *_HEADS,
        *_BOTTLENECK,
        (r"^stage5/", "stages/4/"),
        (r"^stem/conv/", "stem/0/"),
        (r"^stem/norm/", "stem/1/"),
        *((rf"^downsamplers/{i}/norm/", f"stages/{i + 1}/downsample/0/") for i in range(3)),
        *((rf"^downsamplers/{i}/conv/", f"stages/{i + 1}/downsample/1/") for i in range(3)),
        (r"/depthwise/", "/conv_dw/"),
    ),
    official={
        name: Official("GA", "ga_convnext", factory)
        for name, factory in {
            "ga_convnext_t": "ga_convnext_tiny_688",
            "ga_convnext_s": "ga_convnext_small_688",
            "ga_convnext_b": "ga_convnext_base_976",
            "ga_convnext_t_768": "ga_convnext_tiny_768",
            "ga_convnext_s_768": "ga_convnext_small_768",
            "ga_convnext_b_1024": "ga_convnext_base_1024",
        }.items()
    },
)

_CSWIN = Rules(
    renames=(
        *_HEADS,
        *_BOTTLENECK,
        (r"^stage5/mix/", "stage5/1/"),
        (r"^stage5/block/", "stage5/2/"),
        (r"^gram_layer/(\d+)/", r"gram_layer/\1/1/"),
        *((rf"^stem/convs/{i}/", f"stage1_conv_embed/{5 * i}/") for i in range(3)),
        *((rf"^stem/norms/{i}/", f"stage1_conv_embed/{5 * i + 2}/") for i in range(3)),
        *((rf"^stages/{i}/", f"stage{i + 1}/") for i in range(4)),
        *((rf"^merges/{i}/", f"merge{i + 1}/") for i in range(3)),
        (r"/lepe/(\d)/", r"/attns/\1/get_v/"),
    ),
    # Their class, with what its defaults leave open; no function of theirs makes these models.
    official={
        name: Official(
            "GA",
            "ga_cswin",
            "GA_CSWinTransformer",
            {
                "embed_dim": 64,
                "dims": [64, 128, 256, 512],
                "depth": list(variant.depths),
                "split_size": [1, 2, 7, 7, 7],
                "num_heads": [2, 4, 8, 16, 16],
            },
        )
        for name, variant in VARIANTS.items()
    },
)

_RESNET = Rules(
    renames=(
        *_HEADS,
        *_BOTTLENECK,
        (r"^stages/(.*)/norm(\d)/", r"stages/\1/bn\2/"),
        (r"^stem/conv/", "conv1/"),
        (r"^stem/norm/", "bn1/"),
        *((rf"^stages/{i}/", f"layer{i + 1}/") for i in range(4)),
    ),
)

_VIT = Rules(
    renames=(
        *_HEADS,
        (r"^patches/", "patch_embed/proj/"),
        (r"^positions$", "pos_embed"),
        (r"^(blocks/\d+)/(qkv|proj)/", r"\1/attn/\2/"),
    ),
    layouts=((r"^trunk/positions$", "n c -> 1 n c"),),
)

RULES = {GAConvNeXt: _CONVNEXT, GACSWin: _CSWIN, GAResNet: _RESNET, GAViT: _VIT}
