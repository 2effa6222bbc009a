"""GC ViT Large at 512 pixels: 87.6 % top-1 published, 203.8 M parameters; unmeasured here.

D6: no recipe of the authors exists for this size; this is their 384-pixel one. The ImageNet-21k
weights it is described as fine-tuned from were not released.

Row "GC ViT, 384" of docs/recipes.md.

python -m hybrid_flax.main --config=configs/gcvit_l_512.py --workdir=DIR
"""

from hybrid_flax.configs import recipes


def get_config():
    return recipes.gcvit("gcvit_l_512", batch_size=1024, learning_rate=1e-3)
