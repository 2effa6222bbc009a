"""How to tell a step that a run has saved from whatever else lies beside it."""

import re

# Any of them makes a numbered folder a checkpoint; one that lacks the others is damaged.
PARTS = ("state", "manifest", "_CHECKPOINT_METADATA")


def step_of(name: str) -> int | None:
    """The step that a folder of this name holds; None if it is not the name of one."""
    return int(name) if re.fullmatch(r"0|[1-9][0-9]{0,17}", name) else None
