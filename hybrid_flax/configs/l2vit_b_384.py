"""L2ViT Base at 384 pixels: 87.0 % top-1 published, 88.6 M parameters; unmeasured here.

Fine-tunes the ImageNet-22k weights: `--config.init_from=` their converted checkpoint. The authors'
commands leave out the model's name; the window of 12 is the released model's.

Row "L2ViT-B, 22k → 1k" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/l2vit_b_384.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.l2vit_finetune("l2vit_b_384")
