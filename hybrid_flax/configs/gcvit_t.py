"""GC ViT Tiny on ImageNet-1k: 83.5 % top-1 published, 28.2 M parameters; unmeasured here.

Row "GC ViT, XXT to T2" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/gcvit_t.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.gcvit("gcvit_t", batch_size=4096)
