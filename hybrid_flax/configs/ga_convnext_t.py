"""GA-ConvNeXt Tiny: 83.2 % top-1 published, 47.8 M parameters; unmeasured here.

Row "GA-ConvNeXt" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/ga_convnext_t.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.gramian("ga_convnext_t")
