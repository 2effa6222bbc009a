"""GLNet-STL: 82.5 % top-1 published, 30.3 M parameters; unmeasured here.

Row "GLNet" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/glnet_stl.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.glnet("glnet_stl")
