"""The settings of a training run: what there is, what each may be, and how they are read.

`sections.py` declares every field once. Made from it: the locked ConfigDict that configs/ start
from (and with it `--config.a.b=`), the check, what a resumed run may change, and docs/settings.md
(`python -m hybrid_flax.settings`). A program turns its ConfigDict into `Settings` at its door and
hands each component its own section. Needs nothing but the standard library.
"""

from hybrid_flax.settings.reading import (
    DROPPED,
    FIELDS,
    RENAMED,
    Field,
    Tree,
    from_config,
    from_saved,
    old_name,
    replace,
    to_plain,
)
from hybrid_flax.settings.sections import (
    Augment,
    Checkpoint,
    Dataset,
    Eval,
    Loss,
    Mesh,
    Model,
    Optimizer,
    Schedule,
    Settings,
    Sharding,
)

__all__ = [
    "DROPPED",
    "FIELDS",
    "RENAMED",
    "Augment",
    "Checkpoint",
    "Dataset",
    "Eval",
    "Field",
    "Loss",
    "Mesh",
    "Model",
    "Optimizer",
    "Schedule",
    "Settings",
    "Sharding",
    "Tree",
    "from_config",
    "from_saved",
    "old_name",
    "replace",
    "to_plain",
]
