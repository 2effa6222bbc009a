"""The text of a compiled program in its parts: computations, and how often each of them runs.

What a loop runs counts as often as the loop does, where the compiler says how often that is.
"""

import math
import re
from typing import NamedTuple

_BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "u8": 1, "s8": 1, "f64": 8}
_LINE = re.compile(r"\s+(ROOT )?%?(\S+) = (.*?) ([\w-]+)\((.*)$")
_HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) .*\{$")
_ARRAY = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](?:\{([^}]*)\})?")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CALLED = re.compile(r"\b(?:body|condition|calls|to_apply)=%?([\w.-]+)")


class Array(NamedTuple):
    """One of the results of an instruction."""

    dtype: str
    dims: str  # "512,256"
    layout: str

    @property
    def numbers(self) -> int:
        """How many numbers it has."""
        return math.prod(int(dim) for dim in self.dims.split(",") if dim)

    @property
    def bytes(self) -> int:
        return _BYTES.get(self.dtype, 4) * self.numbers


class Instruction(NamedTuple):
    """`%name = shapes operation(operands), attributes`."""

    name: str
    shapes: str
    operation: str
    rest: str  # after the opening bracket
    is_root: bool

    @property
    def arrays(self) -> list[Array]:
        return arrays_of(self.shapes)

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.rest.partition(")")[0])

    def called(self, attribute: str) -> str:
        """The computation that `body`, `calls` or `to_apply` names; "" if there is none."""
        match = re.search(rf"\b{attribute}=%?([\w.-]+)", self.rest)
        return match[1] if match else ""


class Computation(NamedTuple):
    """`%name (parameters) -> result { instructions }`."""

    name: str
    result: str  # shapes
    instructions: dict[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next(line for line in self.instructions.values() if line.is_root)

    def parameter(self, place: int) -> Instruction:
        """The instruction that stands for an argument."""
        return next(
            line
            for line in self.instructions.values()
            if line.operation == "parameter" and line.rest.startswith(f"{place})")
        )

    def users(self, name: str) -> list[Instruction]:
        """The instructions that read what one gives."""
        return [line for line in self.instructions.values() if name in line.operands]


class Program(NamedTuple):
    """The computations of a program by name; the entry's is "ENTRY"."""

    computations: dict[str, Computation]

    def trips(self, loop: Instruction) -> int:
        """How often a `while` runs its body; 1 where that is not known.

        Some compilers say it. Elsewhere it is the bound of a condition that counts from 0.
        """
        if match := _TRIPS.search(loop.rest):
            return int(match[1])
        condition = self.computations.get(loop.called("condition"))
        if condition is None or "direction=LT" not in condition.root.rest:
            return 1
        bound = condition.instructions.get(condition.root.operands[-1])
        is_number = bound is not None and bound.operation == "constant"
        return int(bound.rest.partition(")")[0]) if bound and is_number else 1

    def times(self) -> dict[str, int]:
        """How often each computation runs; what nothing calls is left out."""
        found: dict[str, int] = {}

        def run(name: str, times: int) -> None:
            found[name] = found.get(name, 0) + times
            for line in self.computations[name].instructions.values():
                for called in _CALLED.findall(line.rest):
                    if called in self.computations:
                        run(called, times * (self.trips(line) if line.operation == "while" else 1))

        run("ENTRY", 1)
        return found


def arrays_of(shapes: str) -> list[Array]:
    """The arrays in a shape or a tuple of shapes."""
    return [Array(*found) for found in _ARRAY.findall(shapes)]


def parse(text: str) -> Program:
    """Reads a program as compilers write it."""
    found: dict[str, Computation] = {}
    for line in text.splitlines():
        if (head := _HEAD.match(line)) and " -> " in line:
            name = "ENTRY" if head[1] else head[2]
            result = line.rpartition(" -> ")[2].removesuffix(" {")
            found[name] = Computation(name, result, {})
        elif match := _LINE.match(line):
            root, name, shapes, operation, rest = match.groups()
            instruction = Instruction(name, shapes, operation, rest, bool(root))
            next(reversed(found.values())).instructions[name] = instruction
    return Program(found)
