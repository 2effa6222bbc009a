"""A plan, as `step_plan.plan` returns it, in lines of text for people."""

from typing import Any

from hybrid_flax.costs.targets import GIB
from hybrid_flax.distributed.shardings import MemoryRow, show_memory_table


def show(found: dict[str, Any]) -> str:
    """Writes the plan as lines of text."""
    state = found["bytes_of_state"]
    room = found["memory"] - found["peak_bytes"]
    verdict = f"fits, {size(room)} to spare" if found["fits"] else f"does not fit by {size(-room)}"
    axes = " × ".join(f"{axis} {count}" for axis, count in found["mesh"].items() if count > 1)
    lines = [
        f"{found['model']} on {found['topology']}"
        + (f", {found['slices']} slices" * (found["slices"] > 1))
        + f": {found['chips']} chips, {found['batch_size']} images a step, "
        + f"{found['batch_per_chip']} on a chip"
        + (f" in {found['accumulation_steps']} parts" * (found["accumulation_steps"] > 1)),
        f"mesh: {axes or 'one chip'}",
        show_memory_table([MemoryRow(**share) for share in found["split"]]),
        "memory of a chip",
        *(f"  {name:12} {size(count)}" for name, count in state.items() if count > 4),
        *([f"  temporary    {size(found['temporary_bytes'])}"] * ("temporary_bytes" in found)),
        f"  at most      {size(found['peak_bytes'])} of {size(found['memory'])}: {verdict}",
        f"work of a chip: {found['flops_per_chip'] / 1e12:.2f} TFLOP a step",
        "windows and deformable sampling: "
        + (", ".join(f"{n} × {what}" for what, n in found["kernels"].items()) or "none"),
    ]
    if "collectives" in found:
        lines += [
            *(f"exchanged {line}" for line in exchanged(found["collectives"])),
            "largest arrays",
            *(f"  {size(x['bytes']):>10}  {x['array']}  {x['by']}" for x in found["largest"]),
            f"compiled in {found['compile_seconds']} s"
            + ", without machine code" * (not found["machine_code"]),
        ]
    return "\n".join(lines)


def exchanged(parts: dict[str, dict[str, dict[str, int]]]) -> list[str]:
    """Writes a line for what passes within slices, and one for what passes between them."""

    def line(kinds):
        return ", ".join(f"{kind} {size(x['bytes'])} ({x['count']})" for kind, x in kinds.items())

    where = {"within": "between chips", "between": "between slices"}
    return [f"{where[part]}: {line(kinds)}" for part, kinds in parts.items()] or ["nothing"]


def show_scaling(tables: dict[str, list[dict[str, float]]]) -> str:
    """Writes what `scaling.of_plan` gives as lines of text."""
    lines = ["on paper, nothing of it measured; hybrid_flax/costs/scaling.py says what is assumed"]
    for name, rows in tables.items():
        lines += [
            f"{name} scaling: chips, images on each, images a second, efficiency",
            *(
                f"  {row['chips']:5} {row['images_per_chip']:7g} {row['images_per_second']:10,.0f}"
                f" {row['efficiency']:6.0%}"
                for row in rows
            ),
        ]
    return "\n".join(lines)


def size(count: float) -> str:
    """Writes a number of bytes."""
    return f"{count / GIB:.2f} GiB" if count >= GIB / 10 else f"{count / 2**20:.1f} MiB"
