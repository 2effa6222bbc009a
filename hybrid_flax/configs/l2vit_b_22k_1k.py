"""L2ViT Base from ImageNet-22k to 1k at 224 pixels: 86.0 % top-1 published; unmeasured here.

Fine-tunes the ImageNet-22k weights: `--config.init_from=` a run of l2vit_b_22k.py, or the converted
release; `--config.init_class_map=` keeps the classifier.

Row "L2ViT-B, 22k → 1k" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/l2vit_b_22k_1k.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.l2vit_finetune("l2vit_b")
