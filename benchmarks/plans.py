"""What every model needs on slices that are not here: all configs, compiled, as one table.

python -m benchmarks.plans [--configs=PATTERN] [--topologies=v5e:16x16,v5p:4x4x8] [--again]
python -m benchmarks.plans --render

Compiles each model's training step at its paper's batch, small models first, and keeps what it
finds in benchmarks/results/plans.json, an entry for each config and topology, and as a table in
docs/plans.md. It can be stopped at any time and goes on where it was: entries that are there are
kept, failed ones tried again; --again compiles them all. They are compiled without machine code
(`plan --quick`), about a minute of a core for a small model. Where the batch does not fit, the
entry says in how many parts it would (`--config.accumulation_steps`). Needs `pip install libtpu`;
`--render` makes the table anew from what is kept, and needs no compiler.
"""

import argparse
import fnmatch
import json
import os
import pathlib
import sys
from typing import Any

import configs
import hybrid_flax
from hybrid_flax.costs import scaling
from hybrid_flax.costs.plan_text import size
from hybrid_flax.costs.targets import Target, find_target, set_up
from hybrid_flax.costs.timing import reason
from hybrid_flax.errors import InputError
from hybrid_flax.run.ending import ending
from hybrid_flax.step_plan import plan
from hybrid_flax.versions import versions

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "plans.json"
TABLE = ROOT / "docs" / "plans.md"
TOPOLOGIES = ("v5e:16x16", "v5p:4x4x8")
SCALED = ("gcvit_b", "ga_convnext_b", "glnet_16g", "l2vit_b", "unified_internimage_base")

Entry = dict[str, Any]


def by_size(pattern: str = "*") -> list[str]:
    """Lists the models' configs, small models first."""

    def cost(name: str):
        info = hybrid_flax.model_info(configs.load(name).model.name)
        return info.parameters * info.image_size**2, name

    return sorted(fnmatch.filter(configs.names(), pattern), key=cost)


def entry(name: str, target: Target) -> Entry:
    """The plan of a config; what fails says why."""
    config = configs.load(name)
    key = {"config": name, "topology": target.name}
    try:
        found = plan(config, target, quick=True)
        if not found["fits"]:
            found["fits_in"] = fitting_parts(config, target)
    except Exception as error:  # of any kind: compilers have many
        return {**key, "failed": reason(error), "versions": versions("libtpu")}
    return {**key, **found, "versions": versions("libtpu")}


def fitting_parts(config, target: Target) -> Entry | None:
    """The smallest power of two of `accumulation_steps` with which the batch fits, if one does."""
    while True:
        config.accumulation_steps *= 2
        try:
            found = plan(config, target, quick=True)
        except InputError:  # nothing left to split
            return None
        if found["fits"]:
            return {name: found[name] for name in ("accumulation_steps", "peak_bytes")}


def load() -> dict[tuple[str, str], Entry]:
    """Entries by config and topology."""
    if not RESULTS.exists():
        return {}
    entries = json.loads(RESULTS.read_text())["plans"]
    return {(entry["config"], entry["topology"]): entry for entry in entries}


def store(entries: dict[tuple[str, str], Entry]) -> None:
    """Writes them, a line for each, all or nothing."""
    lines = ",\n".join(json.dumps(entries[key], ensure_ascii=False) for key in sorted(entries))
    unfinished = RESULTS.with_suffix(".tmp")
    unfinished.write_text(f'{{"plans": [\n{lines}\n]}}\n')
    os.replace(unfinished, RESULTS)


def render() -> None:
    """Writes docs/plans.md from the entries that are there."""
    TABLE.write_text(table(load()))


# --------------------------------------------------------------------------------------- the table

_HEAD = """# What the models need on TPUs

Training steps compiled by the TPU compiler for slices that were not there, at the papers' batches
and split over all chips by images only; mostly without machine code, which needs a few hundredths
of the memory more. Everything is counted in the compiled program or said by its compiler; nothing
was run. Figures are those of one chip. Made, and completed, by

```sh
pip install libtpu
python -m benchmarks.plans
```

from [the figures](../benchmarks/results/plans.json), which say with which versions and commit each
was found. "State" is weights, optimizer and average; "exchanged" counts the results of collectives,
most of them gradients; "kernels" counts windows and deformable convolutions that a Pallas kernel
computes, of all.
"""

_SCALING = """
## On many chips, on paper

A simple model of a step's time, from the operations, bytes and gradients counted above. None of it
is measured, and its assumptions ([scaling.py](../hybrid_flax/costs/scaling.py)) are kind:
{flops:.0%} of the datasheet's operations, {memory:.0%} of its memory's and {network:.0%} of its
network's speed, an input pipeline that keeps up, nothing lost to latency. Efficiency is images per
second and chip beside those of 8 chips. Slices of v5e end at 256 chips; beyond, gradients pass over
the data centre's network. "Strong" keeps the paper's batch, down to one image per chip: what it
loses there goes into what every chip does in each step however few its images, reading and writing
weights, optimizer and average, and adding up gradients. "Weak" keeps the images of a chip.
"""


def table(entries: dict[tuple[str, str], Entry]) -> str:
    """The entries as Markdown."""
    text = _HEAD
    for topology in TOPOLOGIES:
        text += f"\n## {topology}\n\n"
        found = [entries[name, topology] for name in by_size() if (name, topology) in entries]
        if found:
            text += (
                "| config | images: all, per chip | state | temporary | at most | fits "
                "| TFLOP a step | exchanged | kernels |\n|---|---|---|---|---|---|---|---|---|\n"
            )
            text += "".join(_row(entry) for entry in found)
        missing = [name for name in by_size() if (name, topology) not in entries]
        if missing:
            text += (
                f"\nNot compiled yet, {len(missing)} of {len(by_size())}; `python -m "
                f"benchmarks.plans --topologies={topology}` does: {', '.join(missing)}.\n"
            )
    scaled = [
        entries[name, topology]
        for name in SCALED
        for topology in TOPOLOGIES
        if "collectives" in entries.get((name, topology), {})
    ]
    if scaled:
        text += _SCALING.format(**scaling.ASSUMED._asdict())
    return text + "".join(_scaling_rows(entry) for entry in scaled)


def _row(entry: Entry) -> str:
    if "failed" in entry:
        return f"| `{entry['config']}` | failed: {entry['failed']} |||||||| \n".replace(" \n", "\n")
    fits = "yes"
    if not entry["fits"]:
        parts = entry.get("fits_in")
        fits = f"in {parts['accumulation_steps']} parts" if parts else "no"
    exchanged = "–"
    if "collectives" in entry:
        kinds = entry["collectives"].get("within", {})
        exchanged = ", ".join(f"{kind} {size(x['bytes'])}" for kind, x in kinds.items())
    kernels, calls = entry["kernels"].get("kernel", 0), sum(entry["kernels"].values())
    cells = [
        f"`{entry['config']}`",
        f"{entry['batch_size']}, {entry['batch_per_chip']}",
        size(sum(entry["bytes_of_state"].values())),
        size(entry["temporary_bytes"]) if "temporary_bytes" in entry else "–",
        size(entry["peak_bytes"]),
        fits,
        f"{entry['flops_per_chip'] / 1e12:.2f}",
        exchanged,
        f"{kernels} of {calls}" if calls else "–",
    ]
    return f"| {' | '.join(cells)} |\n"


def _scaling_rows(entry: Entry) -> str:
    tables = scaling.of_plan(entry, entry["topology"].partition(":")[0])
    weak = {row["chips"]: row for row in tables["weak"]}
    text = (
        f"\n**{entry['config']}**, {entry['topology']}, from a step of {entry['batch_per_chip']} "
        "images per chip\n\n| chips | strong: images per chip, images/s, efficiency "
        "| weak: images/s, efficiency |\n|---|---|---|\n"
    )
    strong = {row["chips"]: row for row in tables["strong"]}
    for chips, row in weak.items():
        cell = "–"
        if chips in strong:
            mine = strong[chips]
            cell = f"{mine['images_per_chip']:g}, {_speed(mine)}"
        text += f"| {chips} | {cell} | {_speed(row)} |\n"
    return text


def _speed(row) -> str:
    return f"{row['images_per_second']:,.0f}, {row['efficiency']:.0%}"


def main() -> int:
    return ending(_main, limited=False) or 0


def _main() -> int:
    """Compiles what is missing; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", default="*", help="shell pattern of configs' names")
    parser.add_argument("--topologies", default=",".join(TOPOLOGIES))
    parser.add_argument("--again", action="store_true", help="compile what is there, too")
    parser.add_argument("--render", action="store_true", help="only write the table, from these")
    options = parser.parse_args()
    if options.render:
        render()
        return 0
    set_up()
    entries, failures = load(), 0
    for topology in options.topologies.split(","):
        target = find_target(topology)
        for name in by_size(options.configs):
            kept = entries.get((name, topology))
            if kept and "failed" not in kept and not options.again:
                continue
            entries[name, topology] = found = entry(name, target)
            failures += "failed" in found
            store(entries)
            render()
            print(_row(found), end="", flush=True)
    render()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
