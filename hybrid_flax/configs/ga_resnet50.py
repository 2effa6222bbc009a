"""GA-ResNet-50: 82.5 % top-1 published, 41.3 M parameters; unmeasured here.

A reconstruction: the authors published no code for this model, only its results.

Row "GA-ConvNeXt" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/ga_resnet50.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.gramian("ga_resnet50")
