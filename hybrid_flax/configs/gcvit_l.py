"""GC ViT Large on ImageNet-1k: 85.7 % top-1 published, 202.1 M parameters; unmeasured here.

Row "GC ViT, S to L" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/gcvit_l.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.gcvit("gcvit_l", batch_size=1024)
