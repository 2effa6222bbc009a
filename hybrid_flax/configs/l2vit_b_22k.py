"""L2ViT Base on ImageNet-22k, to be fine-tuned: l2vit_b_22k_1k.py, l2vit_b_384.py; unmeasured here.

Row "L2ViT-B, 22k" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/l2vit_b_22k.py --workdir=DIR --config.dataset.path=22K
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.l2vit_pretrain("l2vit_b")
