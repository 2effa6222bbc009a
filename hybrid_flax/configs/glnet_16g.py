"""GLNet-16G: 85.0 % top-1 published, 106.1 M parameters; unmeasured here.

Row "GLNet" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/glnet_16g.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.glnet("glnet_16g")
