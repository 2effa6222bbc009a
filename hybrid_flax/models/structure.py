"""The parts of a model, by the paths of its parameters: declared by every family.

Rematerialisation, layer-wise learning rates, freezing, fine-tuning, sharding and conversion ask
here what a parameter belongs to, instead of knowing the names of attributes themselves.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from hybrid_flax.errors import InputError

_NOTHING = r"(?!)"
_PARTS = (
    "stem",
    "blocks",
    "opens_stage",
    "opens_next_stage",
    "closes_stage",
    "after_blocks",
    "end",
)
_START = r"(?:^|/)"  # paths may begin with a collection, or with the place in an optimizer's state


class Structure(NamedTuple):
    """The parts of a family's models, as regular expressions on paths like `stages/0/norm/scale`.

    Every parameter lies in exactly one of `stem`, `blocks`, `opens_stage`, `opens_next_stage`,
    `closes_stage`, `after_blocks` and `end`. The groups of `blocks` are numbers, the stage (if
    there are several) and the block in it; the only group of the others is the stage's number.
    """

    stem: str
    blocks: str
    end: str  # what follows the last block: norms, heads, classifiers
    opens_stage: str = _NOTHING  # its embedding, its downsampler: goes with its first block
    opens_next_stage: str = _NOTHING  # the same, numbered by the stage before
    closes_stage: str = _NOTHING  # goes with its last block
    after_blocks: str = _NOTHING  # a layer of its own between the last block and the end
    classifier: str = r"head/"  # the layers of the end whose width is the number of classes
    head_blocks: str = _NOTHING  # blocks within the end
    position_bias: str = r"/position_bias$"  # tables [(2w-1)², heads] of relative positions
    position_map: str = r"/position_map$"  # tables [H, W, C] or [H·W, C] of learned positions
    split_columns: str = r"/mlp/fc1/"  # of MLPs, matrices that the mesh axis `tensor` may split
    split_rows: str = r"/mlp/fc2/"

    def is_classifier(self, path: str) -> bool:
        """Whether a path, in any collection, is of a layer as wide as the number of classes."""
        return re.search(rf"{_START}(?:{self.classifier})[^/]+$", path) is not None

    def is_block(self, module: str) -> bool:
        """Whether the path of a module is that of a whole block, such as `stages/0/blocks/1`."""
        whole = f"{module}/"
        return any(
            match is not None and match.end() == len(whole)
            for match in (re.match(part, whole) for part in (self.blocks, self.head_blocks))
        )

    def block(self, path: str) -> tuple[int, ...] | None:
        """(stage, block) that a parameter lies in; None outside of blocks."""
        match = re.match(self.blocks, path)
        return tuple(map(int, match.groups())) if match else None

    def layer_ids(self, paths: Iterable[str]) -> dict[str, int]:
        """{path of a parameter: the number of its layer}, by the depth of its block.

        0 is the stem, with learned positions; then come the blocks of all stages in the order in
        which the image meets them; the last number is the classifier's, with the norm and all else
        that follows the last block. This is how BEiT (arXiv:2106.08254, appendix) counts.

        Args:
          paths: of all parameters of a model.

        Raises:
          InputError: a parameter that lies in none of the parts, or in several.
        """
        paths = list(paths)
        blocks = {path: self.block(path) for path in paths}
        order = sorted({block for block in blocks.values() if block is not None})
        numbers = {block: number for number, block in enumerate(order, start=1)}
        last = len(order) + 1 + any(re.match(self.after_blocks, path) for path in paths)

        def of_stage(stage: int, end: bool) -> int:
            return (max if end else min)(numbers[block] for block in order if block[0] == stage)

        def layer(path: str) -> int:
            part, stage = self.part(path)
            block = blocks[path]
            if block is not None:
                return numbers[block]
            if part == "stem":
                return 0
            if part == "after_blocks":
                return len(order) + 1
            if part == "end":
                return last
            return of_stage(stage + (part == "opens_next_stage"), end=part == "closes_stage")

        return {path: layer(path) for path in paths}

    def part(self, path: str) -> tuple[str, int]:
        """The part that a parameter lies in, and the number of its stage (0 where there is none).

        Raises:
          InputError: it lies in none of the parts, or in several.
        """
        matches = {name: re.match(getattr(self, name), path) for name in _PARTS}
        found = {name: match for name, match in matches.items() if match}
        if len(found) != 1:
            parts = " and ".join(found) or "no part"
            raise InputError(
                f"the parameter {path} lies in {parts} of the model's structure: expected exactly "
                "one. Correct `structure` of its class (hybrid_flax/models/structure.py)"
            )
        ((name, match),) = found.items()
        groups = [group for group in match.groups() if group]
        return name, int(groups[0]) if groups else 0
