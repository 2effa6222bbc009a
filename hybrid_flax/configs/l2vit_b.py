"""L2ViT Base: 84.4 % top-1 published, 88.6 M parameters; unmeasured here.

Row "L2ViT, 1k" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/l2vit_b.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.l2vit("l2vit_b")
