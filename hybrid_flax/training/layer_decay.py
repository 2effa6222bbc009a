"""How deep in the network each parameter lies, for learning rates that fall with the depth."""

import re
from collections.abc import Iterable

from hybrid_flax.errors import InputError

_BLOCK = r"(?:trunk/)?(?:stages/(\d+)/)?(?:blocks/)?(\d+)/|trunk/stage(5)/"
_BEGIN = r"(?:trunk/)?(?:stem|patches|positions|stages/0/embed)\b"
_OPENS_STAGE = r"stages/(\d+)/(?:embed|query|downsample)/"
_OPENS_NEXT_STAGE = r"trunk/(?:downsamplers|merges)/(\d+)/"
_CLOSES_STAGE = r"stages/(\d+)/(?:norm|downsample)/"
_END = r"(?:head|token_head|heads|norms?|conv_head|trunk/norm)\b"


def layer_ids(paths: Iterable[str]) -> dict[str, int]:
    """{path of a parameter: the number of its layer}, by the depth of its block.

    0 is the stem, with learned positions; then come the blocks of all stages in the order in which
    the image meets them; the last number is the classifier's, with the norm and all else that
    follows the last block. This is how BEiT (arXiv:2106.08254, appendix) counts. What opens a stage
    (its embedding, its downsampler, GC ViT's shared query) goes with the stage's first block; what
    closes one with its last.

    Args:
      paths: of all parameters of a model, such as `stages/0/blocks/1/norm1/scale`.

    Raises:
      InputError: a parameter of which this cannot be told.
    """
    paths = list(paths)
    blocks = {path: _block(path) for path in paths}
    numbers = {block: i for i, block in enumerate(sorted(set(blocks.values()) - {None}), start=1)}
    # GC ViT's downsamplers close a stage, the unified models' open one: the first has none.
    closes = any(path.startswith("stages/0/downsample/") for path in paths)

    def place(path: str) -> int:
        if blocks[path]:
            return numbers[blocks[path]]
        if re.match(_BEGIN, path):
            return 0
        if match := re.match(_OPENS_NEXT_STAGE, path):
            return numbers[int(match[1]) + 1, 0]
        if (match := re.match(_OPENS_STAGE, path)) and not (closes and "/downsample/" in path):
            return numbers[int(match[1]), 0]
        if match := re.match(_CLOSES_STAGE, path):
            return max(number for block, number in numbers.items() if block[0] == int(match[1]))
        if re.match(_END, path):
            return len(numbers) + 1
        raise InputError(
            f"--config.optimizer.layer_decay: how deep in the network {path} lies is not known; "
            "add its place to hybrid_flax/training/layer_decay.py, or set layer_decay=1.0"
        )

    return {path: place(path) for path in paths}


def _block(path: str) -> tuple[int, int] | None:
    """(stage, block); the Gramian models' bottleneck over all stages is a stage of its own."""
    match = re.match(_BLOCK, path)
    if not match:
        return None
    stage, block, bottleneck = match.groups()
    return (int(bottleneck), 0) if bottleneck else (int(stage or 0), int(block))
