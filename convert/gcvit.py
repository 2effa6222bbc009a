"""GC ViT: our parameter paths → the keys of the official state_dict."""

import numpy as np

from convert.official import Official
from convert.rules import Rules
from hybrid_flax.layers import relative_position_index
from hybrid_flax.models.gcvit import GCViT

# Regular expressions, applied to the path in this order.
_RENAMES = (
    (r"^stem/conv/", "patch_embed/proj/"),
    (r"^stem/", "patch_embed/"),
    (r"^patch_embed/downsample/", "patch_embed/conv_down/"),
    (r"^stages/", "levels/"),
    (r"/query/fuse/", "/q_global_gen/to_q_global/"),
    (r"/(downsample|conv_down)/fuse/", r"/\1/"),
    (r"/depthwise/", "/conv/0/"),
    (r"/se/reduce/", "/conv/2/fc/0/"),
    (r"/se/expand/", "/conv/2/fc/2/"),
    (r"/pointwise/", "/conv/3/"),
    (r"/position_bias$", "/relative_position_bias_table"),
)

# From the release's keys to timm's, which makes the downsampler a part of the stage that follows.
_TIMM = (
    (r"^patch_embed\.proj\.", "stem.conv1."),
    (r"^patch_embed\.conv_down\.", "stem.down."),
    *((rf"^levels\.{i}\.downsample\.", f"stages.{i + 1}.downsample.") for i in range(3)),
    (r"^levels\.", "stages."),
    (r"\.q_global_gen\.", ".global_block."),
    *((rf"\.to_q_global\.{i}\.", f".blocks.conv{i + 1}.") for i in range(3)),
    (r"\.(down|downsample)\.conv\.", r".\1.conv_block.conv."),
    (r"\.conv\.0\.", ".conv_dw."),
    (r"\.conv\.2\.fc\.0\.", ".se.fc1."),
    (r"\.conv\.2\.fc\.2\.", ".se.fc2."),
    (r"\.conv\.3\.", ".conv_pw."),
    (r"\.relative_position_bias_table$", ".rel_pos.relative_position_bias_table"),
    (r"\.gamma([12])$", r".ls\1.gamma"),
    (r"^norm\.", "stages.3.norm."),
    (r"^head\.", "head.fc."),
)


def _derived_buffers(model: GCViT) -> dict[str, np.ndarray]:
    """Entries that the official code stores although they follow from the window size."""
    windows = {block.attn.window for stage in model.stages for block in stage.blocks}
    index = {window: relative_position_index(window) for window in windows}
    return {
        f"levels.{i}.blocks.{j}.attn.relative_position_index": index[block.attn.window]
        for i, stage in enumerate(model.stages)
        for j, block in enumerate(stage.blocks)
    }


_OFFICIAL = {
    name: Official("", "models.gc_vit", factory)
    for name, factory in {
        "gcvit_xxt": "gc_vit_xxtiny",
        "gcvit_xt": "gc_vit_xtiny",
        "gcvit_t": "gc_vit_tiny",
        "gcvit_t2": "gc_vit_tiny2",
        "gcvit_s": "gc_vit_small",
        "gcvit_s2": "gc_vit_small2",
        "gcvit_b": "gc_vit_base",
        "gcvit_l": "gc_vit_large",
        "gcvit_l_384": "gc_vit_large_384_21k",
        "gcvit_l_512": "gc_vit_large_512_21k",
    }.items()
}

RULES = {GCViT: Rules(_RENAMES, derived_buffers=_derived_buffers, timm=_TIMM, official=_OFFICIAL)}
