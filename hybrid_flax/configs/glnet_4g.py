"""GLNet-4G: 83.7 % top-1 published, 27.0 M parameters; unmeasured here.

Row "GLNet" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/glnet_4g.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.glnet("glnet_4g")
