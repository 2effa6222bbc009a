"""GA-CSWin Small: 84.7 % top-1 published, 55.8 M parameters; unmeasured here.

Row "GA-CSWin" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/ga_cswin_s.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.gramian("ga_cswin_s", learning_rate=2e-3)
