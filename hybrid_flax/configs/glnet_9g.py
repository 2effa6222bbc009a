"""GLNet-9G: 84.5 % top-1 published, 60.0 M parameters; unmeasured here.

Row "GLNet" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/glnet_9g.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.glnet("glnet_9g")
