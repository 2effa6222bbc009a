"""GC ViT Base on ImageNet-1k: 85.0 % top-1 published, 90.3 M parameters; unmeasured here.

Row "GC ViT, S to L" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/gcvit_b.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.gcvit("gcvit_b", batch_size=1024)
