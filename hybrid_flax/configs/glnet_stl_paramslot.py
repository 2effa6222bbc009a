"""GLNet-STL with learned slots: 82.1 % top-1 published, 30.5 M parameters; unmeasured here.

Row "GLNet" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/glnet_stl_paramslot.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.glnet("glnet_stl_paramslot")
