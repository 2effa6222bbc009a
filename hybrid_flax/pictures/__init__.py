"""Pictures of what a model does: panels with captions, and pages of them."""

from hybrid_flax.pictures.canvas import Panel, figure, heat, picture_panel
from hybrid_flax.pictures.draw import KINDS, Picture, default_kinds, draw
from hybrid_flax.pictures.page import page

__all__ = [
    "KINDS",
    "Panel",
    "Picture",
    "default_kinds",
    "draw",
    "figure",
    "heat",
    "page",
    "picture_panel",
]
