"""Unified InternImage Micro: 75.3 % top-1 published, 4.3 M parameters; unmeasured here.

Row "Unified, transformers" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/unified_internimage_micro.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.unified("unified_internimage_micro")
