"""GC ViT Large at 384 pixels: 87.4 % top-1 published, 202.9 M parameters; unmeasured here.

D6: the authors' file for this model is a whole 310-epoch schedule with a lower learning rate,
although the model is described as fine-tuned from ImageNet-21k weights, which were not released.
Kept as it is; to fine-tune from weights of yours: `--config.init_from=`.

Row "GC ViT, 384" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/gcvit_l_384.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.gcvit("gcvit_l_384", batch_size=1024, learning_rate=1e-3)
