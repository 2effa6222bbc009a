"""L2ViT: our parameter paths → the keys of the official state_dict."""

from convert.official import Official
from convert.rules import Rules
from hybrid_flax.models.l2vit import L2ViT

# Regular expressions, applied to the path in this order.
_RENAMES = (
    (r"^stages/0/embed/conv1/", "downsample_layers/0/proj/proj/0/"),
    (r"^stages/0/embed/bn1/", "downsample_layers/0/proj/proj/1/"),
    (r"^stages/0/embed/conv2/", "downsample_layers/0/proj/proj/3/"),
    (r"^stages/0/embed/bn2/", "downsample_layers/0/proj/proj/4/"),
    (r"^stages/(\d)/embed/", r"downsample_layers/\1/"),
    (r"/blocks/", "/"),
    (r"/position1/", "/cpe/0/proj/"),
    (r"/position2/", "/cpe/1/proj/"),
    (r"/local_norm/", "/norm3/"),
    (r"/local/depthwise(\d)/", r"/local_mp/conv\1/"),
    (r"/local/", "/local_mp/"),
    (r"^norms/(\d)/", r"norm\1/"),
)

_OFFICIAL = {
    name: Official("classification", "models.l2vit", factory)
    for name, factory in {
        "l2vit_t": "L2ViT_Tiny",
        "l2vit_s": "L2ViT_Small",
        "l2vit_b": "L2ViT_Base",
        "l2vit_b_384": "L2ViT_Base_384",
    }.items()
}

RULES = {L2ViT: Rules(_RENAMES, official=_OFFICIAL)}
