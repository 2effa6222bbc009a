"""Reads the text of a compiled program: what passes between chips, and its largest arrays."""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from hybrid_flax.costs.hlo_program import Array, Instruction, arrays_of, parse

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_KEEPS = (
    "bitcast convert copy copy-start copy-done reshape transpose get-tuple-element tuple "
    "add subtract multiply"
)


class Collective(NamedTuple):
    """One instruction by which chips exchange arrays. Bytes are those of one chip."""

    kind: str  # one of KINDS
    bytes: int  # of the results
    chips: int  # that take part together; slices, where it is between them
    between_slices: bool
    times: int = 1  # that it runs in a step: more than once in a loop

    @property
    def sent(self) -> float:
        """Bytes that a chip sends at least, each time: around a ring."""
        others = (self.chips - 1) / self.chips
        return {
            "all-reduce": 2 * others * self.bytes,
            "all-gather": others * self.bytes,
            "reduce-scatter": (self.chips - 1) * self.bytes,
            "all-to-all": others * self.bytes,
            "collective-permute": self.bytes,
        }[self.kind]


def find_collectives(text: str) -> Iterator[Collective]:
    """Finds all of a program; none within a single chip.

    TPUs exchange arrays between slices through their hosts: such a transfer says in its attributes
    which collective it is part of. A fusion named all-reduce-scatter is a reduce-scatter.
    """
    everyone = int((re.search(r"num_partitions=(\d+)", text) or [0, 1])[1])
    program = parse(text)
    times = program.times()
    for name, computation in program.computations.items():
        for line in computation.instructions.values():
            found = _collective(line, everyone)
            if found and name.startswith("all-reduce-scatter"):
                found = found._replace(kind="reduce-scatter", bytes=_bytes(computation.result))
            if found:
                yield found._replace(times=times.get(name, 1))


def _collective(line: Instruction, everyone: int) -> Collective | None:
    if line.operation == "recv" and (kind := re.search(r'transfer_type="(\w+)"', line.rest)):
        kind = kind[1].lower().replace("_", "-")
        target = re.search(r'megascale_target="\{([\d,]*)\}', line.rest)
        slices = target[1].count(",") + 1 if target else 2
        return Collective(kind, line.arrays[0].bytes, slices, True) if kind in KINDS else None
    kind = line.operation.removesuffix("-start")
    if kind not in KINDS or (chips := _group_size(line.rest, everyone)) == 1:
        return None
    arrays = line.arrays
    # What begins an all-gather has its operands beside its results.
    if line.operation != kind and kind != "all-reduce":
        arrays = arrays[len(arrays) // 2 :]
    return Collective(kind, sum(array.bytes for array in arrays), chips, False)


def collectives(text: str) -> dict[str, dict[str, dict[str, int]]]:
    """Counts collectives: {"within" or "between" slices: {kind: {"count", "bytes", "sent"}}}.

    What a loop does counts as often as it does it.
    """
    found: dict[str, dict[str, dict[str, int]]] = {}
    for one in find_collectives(text):
        part = found.setdefault("between" if one.between_slices else "within", {})
        total = part.setdefault(one.kind, {"count": 0, "bytes": 0, "sent": 0})
        total["count"] += one.times
        total["bytes"] += one.times * one.bytes
        total["sent"] += one.times * round(one.sent)
    return found


class Gathered(NamedTuple):
    """The result of an all-gather."""

    array: str  # f32[512,256]
    of: frozenset[str]  # arguments of the program that it is made of; none: of computed values


def gathered(text: str) -> list[Gathered]:
    """Finds what a compiled program gathers from several chips, and from which of its arguments.

    An argument's name is its path, such as `state['ema']['params']['head']['bias']`. It is found
    through conversions, copies and fusions that keep its dimensions, not through loops; TPUs
    gather within loops and products, where an origin may be missing or be another of that shape.
    """
    computations = parse(text).computations.values()
    lines = {name: line for each in computations for name, line in each.instructions.items()}

    def arguments(name: str, seen: set[str]) -> Iterator[str]:
        if name in seen or name not in lines:
            return
        seen.add(name)
        line = lines[name]
        if line.operation == "parameter":
            if path := re.search(r'op_name="(?!jit\()([^"]*)"', line.rest):
                yield path[1].replace("\\'", "'")
            return
        for operand in line.operands:
            if operand in lines and _same(line.operation, lines[operand].arrays, line.arrays):
                yield from arguments(operand, seen)

    found = []
    for line in lines.values():
        if line.operation in ("all-gather", "all-gather-start"):
            results = line.arrays
            if line.operation == "all-gather-start":
                results = results[len(results) // 2 :]
            for array, operand in zip(results, line.operands, strict=False):
                name = f"{array.dtype}[{array.dims}]"
                found.append(Gathered(name, frozenset(arguments(operand, set()))))
    return found


def largest(text: str, count: int = 5) -> list[dict[str, Any]]:
    """Finds the largest arrays of a compiled program, and what computes them."""
    found: dict[str, dict[str, Any]] = {}
    for computation in parse(text).computations.values():
        for line in computation.instructions.values():
            array = re.match(r"\w+\[[\d,]*\]", line.shapes)
            if not array or line.operation in ("parameter", "get-tuple-element", "bitcast"):
                continue
            origin = re.search(r'op_name="([^"]*)"', line.rest)
            entry = {
                "array": array[0],
                "by": origin[1].split("/", 1)[-1] if origin else line.operation,
                "bytes": _bytes(array[0]),
            }
            found.setdefault(array[0], entry)
    return sorted(found.values(), key=lambda entry: -entry["bytes"])[:count]


def _same(operation: str, operand: list[Array], result: list[Array]) -> bool:
    """Whether an operation may leave an operand what it is, but for its dtype, layout and shape."""
    if operation in _KEEPS.split():
        return bool(_each(operand, lambda x: x.numbers) & _each(result, lambda x: x.numbers))
    if operation in ("fusion", "call"):
        return bool(_each(operand, _dims) & _each(result, _dims))
    return False


def _each(arrays: list[Array], of: Callable[[Array], Any]) -> set[Any]:
    """Collects `of` the arrays in a result, scalars aside."""
    return {of(array) for array in arrays if array.numbers > 1}


def _dims(array: Array) -> tuple[int, ...]:
    return tuple(sorted(int(dim) for dim in array.dims.split(",") if dim not in ("", "1")))


def _bytes(shapes: str) -> int:
    return sum(array.bytes for array in arrays_of(shapes))


def _group_size(rest: str, everyone: int) -> int:
    """Counts the chips that take part in a collective together; text may say that in four ways."""
    if pairs := re.search(r"source_target_pairs=\{(.*?\})\}", rest):
        moved = [pair for pair in re.findall(r"\{(\d+),(\d+)\}", pairs[1]) if pair[0] != pair[1]]
        return 2 if moved else 1
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if shape := re.search(r"replica_groups=\[(\d+),(\d+)\]<=", rest):
        return int(shape[2])
    if groups := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return groups[1].count(",") + 1
    return everyone
