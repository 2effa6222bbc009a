"""What a model does: where it looks, what it groups, what moves it, and how far it stands firm.

Functions take a model with its weights and images [B, H, W, 3], normalised, as
`hybrid_flax.data.model_input` gives them; they work on models of every family or say which they
need. `python -m hybrid_flax.visualize` and `python -m hybrid_flax.analyse` draw and tabulate them.
"""

from hybrid_flax.analysis import invariance
from hybrid_flax.analysis.attention import attention_layers, attention_maps
from hybrid_flax.analysis.cam import grad_cam
from hybrid_flax.analysis.gramian import gramian_similarity
from hybrid_flax.analysis.receptive_field import effective_receptive_field
from hybrid_flax.analysis.sampling import sampling_points
from hybrid_flax.analysis.slot_maps import k_medoids, slots

__all__ = [
    "attention_layers",
    "attention_maps",
    "effective_receptive_field",
    "grad_cam",
    "gramian_similarity",
    "invariance",
    "k_medoids",
    "sampling_points",
    "slots",
]
