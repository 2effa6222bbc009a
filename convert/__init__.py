"""Reads the authors' PyTorch checkpoints into our models, and writes them back.

import convert
state = convert.load_checkpoint("gcvit_1k_base.pth.tar")
convert.load_state_dict(model, state)
"""

from convert.containers import load_checkpoint
from convert.state_dict import load_state_dict, to_state_dict

__all__ = ["load_checkpoint", "load_state_dict", "to_state_dict"]
