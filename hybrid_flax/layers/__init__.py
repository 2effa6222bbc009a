"""Building blocks that two or more of the papers share. Feature maps are NHWC."""

from hybrid_flax.layers.blocks import run_blocks, scanned_blocks
from hybrid_flax.layers.convolutions import DepthwiseConv, PointwiseConv, conv, pytorch_init
from hybrid_flax.layers.drop_path import drop_path, drop_path_rates, split_key
from hybrid_flax.layers.inputs import check_images, training_key
from hybrid_flax.layers.layer_scale import layer_scale, scaled
from hybrid_flax.layers.linear import Mlp, linear, normal_init
from hybrid_flax.layers.norms import BatchNorm, group_batch_norms, layer_norm
from hybrid_flax.layers.options import BiasedOptions, KernelOptions, Options
from hybrid_flax.layers.pooling import adaptive_average_pool
from hybrid_flax.layers.positions import (
    relative_position_bias,
    relative_position_index,
    resize_position_map,
    resize_relative_position_bias,
)
from hybrid_flax.layers.windows import pad_to_multiple
from pallas.deformable_conv import deformable_sampling
from pallas.halo_attention import halo_attention
from pallas.watching import show
from pallas.window_attention import attention, window_attention

__all__ = [
    "BatchNorm",
    "BiasedOptions",
    "DepthwiseConv",
    "KernelOptions",
    "Mlp",
    "Options",
    "PointwiseConv",
    "adaptive_average_pool",
    "attention",
    "check_images",
    "conv",
    "deformable_sampling",
    "drop_path",
    "drop_path_rates",
    "group_batch_norms",
    "halo_attention",
    "layer_norm",
    "layer_scale",
    "linear",
    "normal_init",
    "pad_to_multiple",
    "pytorch_init",
    "relative_position_bias",
    "relative_position_index",
    "resize_position_map",
    "resize_relative_position_bias",
    "run_blocks",
    "scaled",
    "scanned_blocks",
    "show",
    "split_key",
    "training_key",
    "window_attention",
]
