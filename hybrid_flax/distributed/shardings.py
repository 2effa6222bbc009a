"""Placement of each array of the training state: rules as data, pattern → mesh axes.

The first rule whose pattern is found in an array's path says which mesh axes split its last
dimensions. After that `fsdp` splits the largest dimension that is still whole, of every array that
is worth it, so that parameters, optimizer and average take 1/fsdp of the memory; XLA gathers a
layer's parameters where they are used. The same rule finds a parameter, its moments and its
average: their paths end alike.
"""

import logging
import math
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybrid_flax.errors import InputError
from hybrid_flax.models.structure import Structure
from hybrid_flax.weights.paths import flatten

Axes = tuple[str | None, ...]
Rules = tuple[tuple[str, Axes], ...]

SMALLEST = 2**14  # numbers; smaller arrays are not worth gathering


def model_rules(structure: Structure) -> Rules:
    """Says what the mesh axis `tensor` splits of a model.

    The MLPs hold two thirds of the parameters. Their first matrix is split by columns, the second
    by rows, so that one sum per MLP passes between the chips of `tensor`; attention in the Pallas
    kernels is split by heads (`pallas/dispatch.py`). Everything else is whole on every chip of it.
    """
    return (
        (rf"{structure.split_columns}kernel$", (None, "tensor")),
        (rf"{structure.split_columns}bias$", ("tensor",)),
        (rf"{structure.split_rows}kernel$", ("tensor", None)),
        (rf"/(?:{structure.classifier})kernel$", (None, "tensor")),
        (rf"/(?:{structure.classifier})bias$", ("tensor",)),
        (r"", ()),
    )


def state_shardings(
    state: Any,
    mesh: Mesh,
    structure: Structure,
    rules: Iterable[tuple[str, Axes]] = (),
    optimizer_over_data: bool = False,
) -> Any:
    """A sharding for every array of a training state.

    Args:
      state: tree of anything with `shape`; its top level names the parts: `params`, `opt_state`, …
      structure: of the model, see `model_rules`.
      rules: tried before those of the model.
      optimizer_over_data: optimizer and average are split over `data`, too (ZeRO stage 1): they are
        needed only where they are updated.

    Raises:
      InputError: a rule names no axis of the mesh, or its pattern is no regular expression.
    """
    rules = _checked((*rules, *model_rules(structure)))

    def sharding(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        wide = optimizer_over_data and name.startswith(("opt_state/", "ema/"))
        spec = _spec(name, leaf.shape, mesh, rules, ("fsdp", "data") if wide else ("fsdp",))
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, state)


def say_unused_rules(rules: Iterable[tuple[str, Axes]], state: Any) -> None:
    """Warns of rules that are found in the path of no array of the state."""
    paths = flatten(state)
    for pattern, _ in rules:
        if not any(re.search(pattern, path) for path in paths):
            logging.warning(
                "--config.sharding.rules: %r has no effect: it is found in no array's path, such "
                "as %s",
                pattern,
                next(iter(paths), "none"),
            )


def unsharded(shardings: Any) -> Any:
    """Shardings of the same weights while a model computes with them: whole, but for `tensor`.

    Said explicitly, for left to itself XLA may gather the images instead of the weights.
    """

    def used(sharding):
        spec = (axis if axis == "tensor" else None for axis in sharding.spec)
        return NamedSharding(sharding.mesh, PartitionSpec(*spec))

    return jax.tree.map(used, shardings)


def _checked(rules: Rules) -> Rules:
    for rule in rules:
        if not (isinstance(rule, tuple) and len(rule) == 2 and isinstance(rule[1], tuple)):
            raise InputError(
                f"--config.sharding.rules: {rule!r} is not a pattern and a tuple of mesh axes, "
                "such as ('/fc1/kernel$', (None, 'tensor'))"
            )
        pattern, axes = rule
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise InputError(
                f"--config.sharding.rules: {pattern!r} is not a regular expression ({error})"
            ) from error
        if unknown := set(axes) - {"data", "fsdp", "tensor", None}:
            raise InputError(
                f"--config.sharding.rules: {pattern!r} asks for the mesh axis {unknown.pop()!r}; "
                "there are 'data', 'fsdp' and 'tensor', and None for a dimension that stays whole"
            )
    return rules


def _spec(
    name: str, shape: tuple[int, ...], mesh: Mesh, rules: Rules, spread: tuple[str, ...]
) -> PartitionSpec:
    axes = next(axes for pattern, axes in rules if re.search(pattern, name))
    found: list[Any] = [None] * len(shape)
    # Optimizers may keep statistics of another rank beside a parameter: those have no rule.
    if len(axes) <= len(shape):
        for place, axis in enumerate(axes, start=len(shape) - len(axes)):
            # What does not divide stays whole: 1000 classes over 16 chips.
            if axis and mesh.shape[axis] > 1 and shape[place] % mesh.shape[axis] == 0:
                found[place] = axis
    if math.prod(shape) >= SMALLEST:
        for wanted in (spread, spread[:1]):
            size = math.prod(mesh.shape[axis] for axis in wanted)
            free = [i for i, n in enumerate(shape) if found[i] is None and n % size == 0]
            if size > 1 and free and not set(wanted) & set(found):
                found[max(free, key=lambda i: shape[i])] = wanted if len(wanted) > 1 else wanted[0]
                break
    while found and found[-1] is None:
        found.pop()
    return PartitionSpec(*found)


class MemoryRow(NamedTuple):
    """Arrays of one part of the state that are split alike."""

    part: str  # "params"
    axes: str  # "-, tensor"; "whole"
    arrays: int
    total_bytes: int
    chip_bytes: int
    largest: str  # path


def memory_table(state: Any, shardings: Any) -> list[MemoryRow]:
    """Sums up how a state is split: one row per part and way of splitting."""
    found: dict[tuple[str, str], list[tuple[str, Any, Any]]] = {}
    for (name, leaf), sharding in zip(
        flatten(state).items(), jax.tree.leaves(shardings), strict=True
    ):
        spec = (*sharding.spec, *(None,) * (len(leaf.shape) - len(sharding.spec)))
        names = ("×".join(axis) if isinstance(axis, tuple) else axis or "-" for axis in spec)
        axes = ", ".join(names) if any(spec) else "whole"
        found.setdefault((name.split("/")[0], axes), []).append((name, leaf, sharding))
    return [
        MemoryRow(
            part,
            axes,
            len(leaves),
            sum(_bytes(leaf.shape, leaf) for _, leaf, _ in leaves),
            sum(_bytes(sharding.shard_shape(leaf.shape), leaf) for _, leaf, sharding in leaves),
            max(leaves, key=lambda each: math.prod(each[1].shape))[0],
        )
        for (part, axes), leaves in found.items()
    ]


def _bytes(shape: tuple[int, ...], leaf: Any) -> int:
    return math.prod(shape) * leaf.dtype.itemsize


def show_memory_table(found: list[MemoryRow]) -> str:
    """The same as a table for a person; only a line where nothing is split."""
    if all(share.axes == "whole" for share in found):
        total = sum(share.total_bytes for share in found)
        return f"every device holds the whole state, {total / 2**20:,.0f} MiB"
    rows: list[tuple[str, ...]] = [
        ("part", "split over", "arrays", "MiB", "on a device", "largest")
    ]
    for share in sorted(found, key=lambda share: (share.part, -share.total_bytes)):
        sizes = (f"{size / 2**20:,.1f}" for size in (share.total_bytes, share.chip_bytes))
        rows.append((share.part, share.axes, str(share.arrays), *sizes, share.largest))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if 2 <= i <= 4 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
