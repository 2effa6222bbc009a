"""Unified HaloNet Tiny: 83.0 % top-1 published, 31.5 M parameters; unmeasured here.

Row "Unified, transformers" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/unified_halonet_tiny.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.unified("unified_halonet_tiny")
