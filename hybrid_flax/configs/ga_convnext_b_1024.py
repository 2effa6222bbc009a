"""GA-ConvNeXt Base with 1024 channels in stage 4, accuracy unpublished: 128.8 M parameters.

Row "GA-ConvNeXt" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/ga_convnext_b_1024.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.gramian("ga_convnext_b_1024")
