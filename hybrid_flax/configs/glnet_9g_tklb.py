"""GLNet-9G with token labelling: 85.3 % top-1 published, 60.8 M parameters; unmeasured here.

Row "GLNet, token labelling" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/glnet_9g_tklb.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.glnet_token_labelling("glnet_9g_tklb")
