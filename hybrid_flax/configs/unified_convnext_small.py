"""Unified ConvNeXt Small: 83.1 % top-1 published, 54.4 M parameters; unmeasured here.

Row "Unified, CNNs" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/unified_convnext_small.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.unified("unified_convnext_small")
