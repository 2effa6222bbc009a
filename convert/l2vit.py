"""L2ViT: our parameter paths → the keys of the official state_dict; its 22k classes → 1k."""

from collections.abc import Mapping, Sequence

import numpy as np

from convert.official import Official
from convert.rules import Rules
from hybrid_flax.errors import InputError
from hybrid_flax.models.l2vit import L2ViT
from hybrid_flax.weights.class_map import check_rows

# Regular expressions, applied to the path in this order.
_RENAMES = (
    (r"^stages/0/embed/conv1/", "downsample_layers/0/proj/proj/0/"),
    (r"^stages/0/embed/bn1/", "downsample_layers/0/proj/proj/1/"),
    (r"^stages/0/embed/conv2/", "downsample_layers/0/proj/proj/3/"),
    (r"^stages/0/embed/bn2/", "downsample_layers/0/proj/proj/4/"),
    (r"^stages/(\d)/embed/", r"downsample_layers/\1/"),
    (r"/blocks/", "/"),
    (r"/position1/", "/cpe/0/proj/"),
    (r"/position2/", "/cpe/1/proj/"),
    (r"/local_norm/", "/norm3/"),
    (r"/local/depthwise(\d)/", r"/local_mp/conv\1/"),
    (r"/local/", "/local_mp/"),
    (r"^norms/(\d)/", r"norm\1/"),
)


def select_classes(state: Mapping[str, np.ndarray], rows: Sequence[int]) -> dict[str, np.ndarray]:
    """A state_dict whose classifier has only the given rows, in their order.

    Makes a 22k-pretrained L2ViT one for 1000 classes, to fine-tune or to evaluate. The authors'
    class map follows their own order of ImageNet-22k; other models' maps do not fit.

    Args:
      state: with `head.weight` [classes, C] and `head.bias` [classes].
      rows: which class of `state` each new class is.

    Raises:
      InputError: no classifier, no rows, a row twice, or one that the classifier does not have.
    """
    missing = {"head.weight", "head.bias"} - set(state)
    if missing:
        raise InputError(
            f"this state_dict has no {' and no '.join(sorted(missing))} to select from: a class "
            "map is for a file with L2ViT's classifier. Give such a file, or leave the map out"
        )
    check_rows(rows, len(state["head.bias"]))
    picked = {key: np.asarray(state[key])[list(rows)] for key in ("head.weight", "head.bias")}
    return {**state, **picked}


_OFFICIAL = {
    name: Official("classification", "models.l2vit", factory)
    for name, factory in {
        "l2vit_t": "L2ViT_Tiny",
        "l2vit_s": "L2ViT_Small",
        "l2vit_b": "L2ViT_Base",
        "l2vit_b_384": "L2ViT_Base_384",
    }.items()
}

RULES = {L2ViT: Rules(_RENAMES, official=_OFFICIAL)}
