"""GC ViT Tiny2 on ImageNet-1k: 83.7 % top-1 published, 34.5 M parameters; unmeasured here.

Row "GC ViT, XXT to T2" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/gcvit_t2.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.gcvit("gcvit_t2", batch_size=4096)
