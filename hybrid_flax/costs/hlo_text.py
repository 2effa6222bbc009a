"""Reads the text of a compiled program: what passes between chips, its largest arrays, traffic."""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "u8": 1, "s8": 1, "f64": 8}
_LINE = re.compile(r"^\s*(?:ROOT )?%?(\S+) = (.*?) ([\w-]+)\((.*)$", re.MULTILINE)
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
_KEEPS = (
    "bitcast convert copy copy-start copy-done reshape transpose get-tuple-element tuple "
    "add subtract multiply"
)
_PLACED = re.compile(_ARRAY.pattern + r"(?:\{([^}]*)\})?")  # with its layout


class Collective(NamedTuple):
    """One instruction by which chips exchange arrays. Bytes are those of one chip."""

    kind: str  # one of KINDS
    bytes: int  # of the results
    chips: int  # that take part together; slices, where it is between them
    between_slices: bool

    @property
    def sent(self) -> float:
        """Bytes that a chip sends at least: around a ring."""
        others = (self.chips - 1) / self.chips
        return {
            "all-reduce": 2 * others * self.bytes,
            "all-gather": others * self.bytes,
            "reduce-scatter": (self.chips - 1) * self.bytes,
            "all-to-all": others * self.bytes,
            "collective-permute": self.bytes,
        }[self.kind]


def find_collectives(text: str) -> Iterator[Collective]:
    """Finds all of a program, each once, however often a loop runs it; none within a single chip.

    TPUs exchange arrays between slices through their hosts: such a transfer says in its attributes
    which collective it is part of. A fusion named all-reduce-scatter is a reduce-scatter.
    """
    everyone = int((re.search(r"num_partitions=(\d+)", text) or [0, 1])[1])
    fused = {}  # what a computation returns, for the bodies of such fusions
    for match in re.finditer(r"^%?(all-reduce-scatter\S*) .* -> (.*) \{$", text, re.MULTILINE):
        fused[match.start()] = match.end(), match[2]
    ends = [(start, text.find("\n}", end), result) for start, (end, result) in fused.items()]
    for line in _LINE.finditer(text):
        shapes, operation, rest = line[2], line[3], line[4]
        if operation == "recv" and (kind := re.search(r'transfer_type="(\w+)"', rest)):
            kind = kind[1].lower().replace("_", "-")
            target = re.search(r'megascale_target="\{([\d,]*)\}', rest)
            slices = target[1].count(",") + 1 if target else 2
            if kind in KINDS.split("|"):
                yield Collective(kind, _sizes(shapes)[0], slices, True)
            continue
        kind = operation.removesuffix("-start")
        if kind not in KINDS.split("|"):
            continue
        chips = _group_size(rest, everyone)
        if chips == 1:
            continue
        sizes = _sizes(shapes)
        # What begins an all-gather has its operands beside its results.
        if operation != kind and kind != "all-reduce":
            sizes = sizes[len(sizes) // 2 :]
        for start, end, result in ends:
            if start < line.start() < end:
                kind, sizes = "reduce-scatter", _sizes(result)
        yield Collective(kind, sum(sizes), chips, False)


def collectives(text: str) -> dict[str, dict[str, dict[str, int]]]:
    """Counts collectives: {"within" or "between" slices: {kind: {"count", "bytes", "sent"}}}."""
    found: dict[str, dict[str, dict[str, int]]] = {}
    for one in find_collectives(text):
        part = found.setdefault("between" if one.between_slices else "within", {})
        total = part.setdefault(one.kind, {"count": 0, "bytes": 0, "sent": 0})
        total["count"] += 1
        total["bytes"] += one.bytes
        total["sent"] += round(one.sent)
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
    lines = {match[1]: match for match in _LINE.finditer(text)}

    def arguments(name: str, seen: set[str]) -> Iterator[str]:
        if name in seen or name not in lines:
            return
        seen.add(name)
        _, shapes, operation, rest = lines[name].groups()
        if operation == "parameter":
            if path := re.search(r'op_name="(?!jit\()([^"]*)"', rest):
                yield path[1].replace("\\'", "'")
            return
        for operand in _operands(rest):
            if operand in lines and _same(operation, lines[operand][2], shapes):
                yield from arguments(operand, seen)

    found = []
    for line in lines.values():
        if line[3] in ("all-gather", "all-gather-start"):
            results = _ARRAY.findall(line[2])
            if line[3] == "all-gather-start":
                results = results[len(results) // 2 :]
            operands = _operands(line[4])
            for (dtype, dims), operand in zip(results, operands, strict=False):
                found.append(Gathered(f"{dtype}[{dims}]", frozenset(arguments(operand, set()))))
    return found


def largest(text: str, count: int = 5) -> list[dict[str, Any]]:
    """Finds the largest arrays of a compiled program, and what computes them."""
    found: dict[str, dict[str, Any]] = {}
    for line in _LINE.finditer(text):
        array, operation = re.match(r"\w+\[[\d,]*\]", line[2]), line[3]
        if not array or operation in ("parameter", "get-tuple-element", "bitcast"):
            continue
        origin = re.search(r'op_name="([^"]*)"', line[4])
        entry = {"array": array[0], "by": origin[1].split("/", 1)[-1] if origin else operation}
        found.setdefault(array[0], entry | {"bytes": sum(_sizes(array[0]))})
    return sorted(found.values(), key=lambda entry: -entry["bytes"])[:count]


_STARTS = "copy-start slice-start async-start"
_NO_TRAFFIC = "parameter get-tuple-element bitcast tuple constant while conditional partition-id"


def memory_traffic(text: str) -> int:
    """Counts the bytes that a program's instructions read and write in a chip's main memory.

    The arguments and results of each, but for those that the compiler keeps beside the cores (it
    marks them S(1)). What loops do is left out; what an instruction reads in part counts whole.
    """
    here, total = {}, 0
    for line in _LINE.finditer(text, text.index("\nENTRY ")):
        name, shapes, operation, rest = line.groups()
        parts = [
            0 if "S(" in layout else _BYTES.get(dtype, 4) * _count(dims)
            for dtype, dims, layout in _PLACED.findall(shapes)
        ]
        here[name] = sum(parts)
        if operation in _STARTS.split():  # as much as the smaller of its ends
            ends = [size for size in _sizes(shapes) if size > 4]
            total += min(ends, default=0) * sum(part > 4 for part in parts)
        elif operation not in _NO_TRAFFIC.split() and not operation.endswith("-done"):
            total += here[name] + sum(here.get(operand, 0) for operand in _operands(rest))
    return total


def _operands(rest: str) -> list[str]:
    return re.findall(r"%([\w.-]+)", rest.partition(")")[0])


def _same(operation: str, operand: str, result: str) -> bool:
    """Whether an operation may leave an operand what it is, but for its dtype, layout and shape."""
    if operation in _KEEPS.split():
        return bool(_each(operand, _count) & _each(result, _count))
    if operation in ("fusion", "call"):
        return bool(_each(operand, _dims) & _each(result, _dims))
    return False


def _each(shapes: str, of: Callable[[str], Any]) -> set[Any]:
    """Collects `of` the arrays in a result, scalars aside."""
    return {of(dims) for _, dims in _ARRAY.findall(shapes) if _count(dims) > 1}


def _dims(dims: str) -> tuple[int, ...]:
    return tuple(sorted(int(dim) for dim in dims.split(",") if dim not in ("", "1")))


def _count(dims: str) -> int:
    return math.prod(int(dim) for dim in dims.split(",") if dim)


def _sizes(shapes: str) -> list[int]:
    return [_BYTES.get(dtype, 4) * _count(dims) for dtype, dims in _ARRAY.findall(shapes)]


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
