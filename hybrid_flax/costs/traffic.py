"""Bytes that a compiled program moves to and from a chip's main memory, counted in its text."""

from hybrid_flax.costs.hlo_program import Array, Computation, Instruction, Program, parse

_STARTS = ("copy-start", "slice-start", "async-start")
_NONE = "parameter get-tuple-element bitcast tuple constant conditional partition-id".split()


def memory_traffic(text: str) -> int:
    """Counts the bytes that a program's instructions read and write in a chip's main memory.

    The arguments and results of each, but for those that the compiler keeps beside the cores (it
    marks them S(1)); in a loop as often as it runs. What an instruction reads in part counts whole,
    but for what a loop takes from a stack or puts into it, a slice at a time.
    """
    program = parse(text)
    return _traffic(program, program.computations["ENTRY"])


def _traffic(program: Program, computation: Computation) -> int:
    lines, total = computation.instructions, 0
    for line in lines.values():
        if line.operation == "while":
            total += program.trips(line) * _traffic(
                program, program.computations[line.called("body")]
            )
        elif line.operation == "call":
            total += _traffic(program, program.computations[line.called("to_apply")])
        elif line.operation in _STARTS:  # as much as the smaller of its ends
            ends = [array.bytes for array in line.arrays if array.bytes > 4]
            total += min(ends, default=0) * sum(_size(array) > 4 for array in line.arrays)
        elif line.operation not in _NONE and not line.operation.endswith("-done"):
            written = _written(program, computation, line)
            total += sum(map(min, map(_size, line.arrays), written))
            for place, operand in enumerate(line.operands):
                if operand in lines:
                    there = sum(map(_size, lines[operand].arrays))
                    total += min(there, _read(program, computation, line, place))
    return total


def _size(array: Array) -> int:
    """Bytes of it that lie in main memory."""
    return 0 if "S(" in array.layout else array.bytes


def _whole(line: Instruction) -> int:
    return sum(array.bytes for array in line.arrays)


def _read(program: Program, computation: Computation, line: Instruction, place: int) -> int:
    """Bytes of an operand that an instruction reads."""
    operand = computation.instructions[line.operands[place]]
    if line.operation == "dynamic-slice":
        return _whole(line)
    if line.operation == "dynamic-update-slice" and place == 0:  # written into, where it is
        return 0
    if line.operation != "fusion":
        return _whole(operand)
    inner = program.computations[line.called("calls")]
    return _read_by_users(program, inner, inner.parameter(place))


def _read_by_users(program: Program, computation: Computation, source: Instruction) -> int:
    total = 0
    for user in computation.users(source.name):
        if user.operation == "bitcast":
            total += _read_by_users(program, computation, user)
        else:
            places = [place for place, name in enumerate(user.operands) if name == source.name]
            total += sum(_read(program, computation, user, place) for place in places)
    return total


def _written(program: Program, computation: Computation, line: Instruction) -> list[int]:
    """Bytes of each of its results that an instruction writes."""
    if line.operation == "dynamic-update-slice":
        return [_whole(computation.instructions[line.operands[1]])]
    if line.operation == "fusion":
        inner = program.computations[line.called("calls")]
        return _written(program, inner, inner.root)
    if line.operation == "bitcast":
        return _written(program, computation, computation.instructions[line.operands[0]])
    if line.operation == "tuple":
        return [
            _written(program, computation, computation.instructions[operand])[0]
            for operand in line.operands
        ]
    return [array.bytes for array in line.arrays]
