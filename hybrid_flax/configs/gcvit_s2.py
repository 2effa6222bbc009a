"""GC ViT Small2 on ImageNet-1k: 84.8 % top-1 published, 68.6 M parameters; unmeasured here.

Row "GC ViT, S to L" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/gcvit_s2.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.gcvit("gcvit_s2", batch_size=1024)
