"""GA-CSWin Tiny: 84.1 % top-1 published, 43.4 M parameters; unmeasured here.

Row "GA-CSWin" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/ga_cswin_t.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.gramian("ga_cswin_t", learning_rate=2e-3)
