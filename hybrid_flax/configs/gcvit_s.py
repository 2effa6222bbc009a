"""GC ViT Small on ImageNet-1k: 84.3 % top-1 published, 51.1 M parameters; unmeasured here.

Row "GC ViT, S to L" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/gcvit_s.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.gcvit("gcvit_s", batch_size=1024)
