"""GA-ConvNeXt Small with 768 channels in stage 4, accuracy unpublished: 76.7 M parameters.

Row "GA-ConvNeXt" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/ga_convnext_s_768.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.gramian("ga_convnext_s_768")
