"""Unified PVT Tiny: 82.1 % top-1 published, 31.2 M parameters; unmeasured here.

Row "Unified, transformers" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/unified_pvt_tiny.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.unified("unified_pvt_tiny")
