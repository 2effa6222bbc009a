"""Unified Swin Base: 83.7 % top-1 published, 93.4 M parameters; unmeasured here.

Row "Unified, transformers" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/unified_swin_base.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.unified("unified_swin_base")
