"""Building blocks that two or more of the papers share. Feature maps are NHWC."""

from hybrid_flax.layers.convolutions import DepthwiseConv, PointwiseConv, conv
from hybrid_flax.layers.drop_path import drop_path
from hybrid_flax.layers.mlp import Mlp
from hybrid_flax.layers.position_bias import (
    relative_position_index,
    resize_relative_position_bias,
)
from hybrid_flax.layers.windows import merge_windows, partition_windows

__all__ = [
    "DepthwiseConv",
    "Mlp",
    "PointwiseConv",
    "conv",
    "drop_path",
    "merge_windows",
    "partition_windows",
    "relative_position_index",
    "resize_relative_position_bias",
]
