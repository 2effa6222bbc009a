"""Unified ConvNeXt Base: 83.7 % top-1 published, 95.9 M parameters; unmeasured here.

Row "Unified, CNNs" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/unified_convnext_base.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.unified("unified_convnext_base")
