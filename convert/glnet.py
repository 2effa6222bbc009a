"""GLNet: our parameter paths → the keys of the official state_dict."""

from convert.official import Official
from convert.rules import Rules
from hybrid_flax.models.glnet import VARIANTS, GLNet

# Regular expressions, applied to the path in this order.
_RENAMES = (
    (r"^stages/(\d)/embed/conv1/", r"downsample_layers/\1/1/"),
    (r"^stages/(\d)/embed/bn1/", r"downsample_layers/\1/2/"),
    (r"^stages/(\d)/embed/conv2/", r"downsample_layers/\1/4/"),
    (r"^stages/(\d)/embed/bn2/", r"downsample_layers/\1/5/"),
    (r"^stages/(\d)/embed/(conv|merge_bn)/", r"downsample_layers/\1/0/"),
    (r"^stages/(\d)/embed/(bn|merge)/", r"downsample_layers/\1/1/"),
    (r"/position/", "/pos_conv/"),
    (r"/mixer/", "/"),
    (r"/slot_attn/", "/relation_mha/"),
    (r"/attn/", "/mha_op/"),
    (r"/qkv/kernel$", "/in_proj_weight"),
    (r"/qkv/bias$", "/in_proj_bias"),
    (r"/proj/", "/out_proj/"),
    (r"/local/pointwise1/", "/feature_conv/0/"),
    (r"/local/depthwise/", "/feature_conv/1/"),
    (r"/local/pointwise2/", "/feature_conv/2/"),
    (r"/mlp/(expand|fc1)/", "/mlp/0/"),
    (r"/mlp/depthwise/", "/mlp/1/"),
    (r"/mlp/reduce/", "/mlp/3/"),
    (r"/mlp/fc2/", "/mlp/2/"),
    (r"/(map|token)_gamma$", "/ls1/gamma"),
    (r"/mlp_gamma$", "/ls2/gamma"),
    (r"^token_head/", "tklb_aux_head/"),
)

_LAYOUTS = ((r"/(map|mlp)_gamma$", "c -> 1 c 1 1"),)  # scales of maps; those of tokens are (c)

_OFFICIAL = {
    name: Official("", "models.glnet_tklb" if name.endswith("tklb") else "models.glnet", name)
    for name in VARIANTS
}

RULES = {GLNet: Rules(_RENAMES, layouts=_LAYOUTS, official=_OFFICIAL)}
