"""Unified InternImage Tiny: 83.3 % top-1 published, 29.9 M parameters; unmeasured here.

Row "Unified, transformers" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/unified_internimage_tiny.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.unified("unified_internimage_tiny")
