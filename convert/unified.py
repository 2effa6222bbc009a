"""The unified models: our parameter paths → the keys of the official state_dict.

The keys and layouts inside a block differ from mixer to mixer.
"""

import numpy as np

from convert.official import Official
from convert.rules import Pairs, Rules
from hybrid_flax.layers import relative_position_index
from hybrid_flax.models.backbone import square
from hybrid_flax.models.unified import VARIANTS, Unified
from hybrid_flax.models.unified.swin import ShiftedWindowAttention
from pallas.window_attention.reference import shift_mask

_ATTENTION = ((r"/mixer/", "/attn/"), (r"/gamma([12])$", r"/gamma_\1"))

_RENAMES = {
    "halonet": (
        *_ATTENTION,
        (r"/row_table$", "/pos_embed/height_rel"),
        (r"/column_table$", "/pos_embed/width_rel"),
    ),
    "pvt": ((r"/mixer/position_map$", "/pos_embed"), *_ATTENTION, (r"/reduce/", "/sr/")),
    "swin": (*_ATTENTION, (r"/position_bias$", "/relative_position_bias_table")),
    "convnext": (
        (r"/mixer/(in|out)put_proj/", r"/dw_\1put_proj/"),
        (r"/dw_output_proj/", "/dw_out_proj/"),
        (r"/mixer/depthwise/", "/dwconv/"),
        (r"/norm1/", "/dw_norm/"),
        (r"/norm2/", "/pw_norm/"),
        (r"/mlp/fc", "/pwconv"),
        (r"/gamma([12])$", r"/gamma_\1"),
    ),
    "internimage": (
        (r"/mixer/", "/attn/"),
        (r"/depthwise/", "/dw_conv/0/"),
        (r"/attn/norm/", "/attn/dw_conv/1/norm/"),
        (r"/offsets/", "/sampling_offsets/"),
        (r"/weights/", "/attention_weights/"),
    ),
}

_LAYOUTS = {
    "halonet": ((r"/gamma[12]$", "c -> 1 1 1 c"),),
    "pvt": ((r"/position_map$", "h w c -> 1 c h w"),),
    "convnext": ((r"/gamma1$", "c -> 1 c 1 1"), (r"/gamma2$", "c -> 1 1 1 c")),
}


def _renames_of(model: Unified) -> Pairs:
    return (
        (r"^stages/(\d)/downsample/conv/", r"downsample_layers/\1/reduction/0/"),
        (r"^stages/(\d)/downsample/norm/", r"downsample_layers/\1/reduction/1/"),
        (r"^stages/(\d)/norm/", r"out_norm_\1/" if model.variant.detection else r"stage_norms/\1/"),
        (r"^stages/(\d)/blocks/", r"stages/\1/"),
        (r"^conv_head/conv/", "conv_head/0/"),
        (r"^conv_head/norm/", "conv_head/1/"),
        *((f"^stem/{ours}/", f"downsample_layers/0/stem/{theirs}/") for ours, theirs in _STEM),
        *_RENAMES[model.variant.mixer],
    )


_STEM = (("conv1", 0), ("norm1", 1), ("conv2", 3), ("norm2", 4))


def _layouts_of(model: Unified) -> Pairs:
    return _LAYOUTS.get(model.variant.mixer, ())


def _derived_buffers(model: Unified) -> dict[str, np.ndarray]:
    """Entries that the official Swin stores although they follow from window and image size."""
    buffers = {}
    for i, stage in enumerate(model.stages):
        for j, block in enumerate(stage.blocks):
            if not isinstance(block.mixer, ShiftedWindowAttention):
                continue
            side = square(model.image_size, "Swin") // (4 * 2**i)
            window, shift = block.mixer.window, block.mixer.shift
            index = relative_position_index(window)
            buffers[f"stages.{i}.{j}.attn.relative_position_index"] = index
            if shift and not model.variant.detection:
                mask = shift_mask(side, side, (window, window), (shift, shift))
                buffers[f"stages.{i}.{j}.attn_mask"] = mask
    return buffers


# The deformable mixer needs their CUDA extension; without it, its import fails and is reported.
_OFFICIAL = {
    name: Official(
        "classification",
        f"models.model_factory.{file}_factory",
        name.replace(variant.mixer, factory),
    )
    for name, variant in VARIANTS.items()
    for file, factory in [
        {
            "halonet": ("halonet", "halo"),
            "pvt": ("pvt", "pvt"),
            "swin": ("swin", "swin"),
            "convnext": ("convnext", "convnext"),
            "internimage": ("dcnv3", "dcn_v3"),
        }[variant.mixer]
    ]
}

RULES = {Unified: Rules(_renames_of, _layouts_of, _derived_buffers, _OFFICIAL)}
