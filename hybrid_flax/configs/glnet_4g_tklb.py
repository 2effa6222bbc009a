"""GLNet-4G with token labelling: 84.4 % top-1 published, 27.5 M parameters; unmeasured here.

Row "GLNet, token labelling" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/glnet_4g_tklb.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.glnet_token_labelling("glnet_4g_tklb")
