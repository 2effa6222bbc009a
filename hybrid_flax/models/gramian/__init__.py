"""Gramian attention heads (Ryu, Han, Lim, ICCV 2023, arXiv:2310.16483): five classifiers, one sum.

An image meets, in this order: a trunk of four stages; the aggregation of their maps on the grid of
stage 3 and stage 5, which mixes them (`aggregation.py`); five heads side by side that share nothing
(`heads.py`). A head turns the channel-by-channel Gramian of its map into a class token, lets it
look once at the places of the map, and classifies it. In evaluation the heads' logits are summed;
in training each has its own loss, and one that keeps them apart (`network.py`).

The trunks: `convnext.py` and `cswin.py` follow the released code. For `resnet.py` and `vit.py`
none was released: they are reconstructions from published counts, as their docstrings say.

Shapes: B images, H×W map, C or D channels, g channels of the Gramian, N = H·W places.
"""

from hybrid_flax.models.gramian import convnext, cswin, resnet, vit
from hybrid_flax.models.gramian.convnext import GAConvNeXt
from hybrid_flax.models.gramian.cswin import GACSWin
from hybrid_flax.models.gramian.resnet import GAResNet
from hybrid_flax.models.gramian.vit import GAViT

FAMILIES = (convnext.FAMILY, cswin.FAMILY, resnet.FAMILY, vit.FAMILY)

__all__ = ["FAMILIES", "GACSWin", "GAConvNeXt", "GAResNet", "GAViT"]
