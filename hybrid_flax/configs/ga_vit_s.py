"""GA-ViT Small: 80.9 % top-1 published, 27.7 M parameters; unmeasured here.

A reconstruction: the authors published no code for this model, only its results.

Row "GA-ConvNeXt" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/ga_vit_s.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.gramian("ga_vit_s")
