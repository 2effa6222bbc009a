"""Unified HaloNet Base: 84.6 % top-1 published, 93.3 M parameters; unmeasured here.

Row "Unified, transformers" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/unified_halonet_base.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.unified("unified_halonet_base")
