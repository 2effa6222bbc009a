"""GC ViT XTiny on ImageNet-1k: 82.0 % top-1 published, 20.0 M parameters; unmeasured here.

Row "GC ViT, XXT to T2" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/gcvit_xt.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.gcvit("gcvit_xt", batch_size=4096)
