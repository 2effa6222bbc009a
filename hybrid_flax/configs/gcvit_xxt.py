"""GC ViT XXTiny on ImageNet-1k: 79.9 % top-1 published, 12.0 M parameters; unmeasured here.

Row "GC ViT, XXT to T2" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/gcvit_xxt.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.gcvit("gcvit_xxt", batch_size=4096)
