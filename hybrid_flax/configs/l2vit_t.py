"""L2ViT Tiny: 83.1 % top-1 published, 28.6 M parameters; unmeasured here.

Row "L2ViT, 1k" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/l2vit_t.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.l2vit("l2vit_t")
