"""What a loop over equal blocks saves and costs: compile time, memory, traffic, without and with.

python -m benchmarks.scan_blocks [--configs=gcvit_b,…] [--targets=cpu,v5e:16x16,v5p:4x4x8] [--again]

Compiles each config's training step with `model.scan_blocks` off and on, one after the other, each
in a process of its own, and keeps what it finds in benchmarks/results/scan_blocks.json; what is
there is kept. The table in docs/costs.md is made of it, by `python -m docs.generate`.

Steps for the CPU have 2 images and are compiled to the end. Those for TPUs (`pip install libtpu`)
split the config's batch over the slice, and no machine code is made. Seconds are the processors',
summed over threads, so that other work on the machine counts little; bytes are those of one chip.
"""

import argparse
import json
import multiprocessing
import pathlib
import resource
import sys
import time
from typing import Any

import jax

import configs
from hybrid_flax.costs import compile_only, records
from hybrid_flax.costs.targets import Target, find_target, set_up
from hybrid_flax.costs.traffic import memory_traffic
from hybrid_flax.run.ending import ending
from hybrid_flax.step_plan import lower
from hybrid_flax.versions import versions

RESULTS = pathlib.Path(__file__).parent / "results" / "scan_blocks.json"
CONFIGS = (
    "gcvit_b",
    "gcvit_l",
    "unified_pvt_base",
    "unified_internimage_base",
    "unified_swin_base",
    "ga_cswin_s",
)
TARGETS = ("cpu", "v5e:16x16", "v5p:4x4x8")

Entry = dict[str, Any]


class Here(Target):
    """A device of this machine, whatever its memory."""

    memory = float("inf")


def entry(name: str, target: str, scan: str) -> Entry:
    """Compiles one step. Raises InputError, or `compile_only.CompilerError`."""
    key = {"config": name, "target": target, "scan_blocks": scan}
    started = time.perf_counter()
    if target == "cpu":
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            found = pool.apply(_on_cpu, (name, scan))
    else:
        before = _seconds_of_children()
        known, text, _, temporary = compile_only.buffer_assignment(_lower, name, target, scan)
        found = known | {"temporary_bytes": temporary, "memory_traffic": memory_traffic(text)}
        seconds = _seconds_of_children() - before - known["seconds_before"]
        found["compile_seconds"] = round(seconds, 1)
    wall = time.perf_counter() - started
    return key | found | {"wall_seconds": round(wall, 1), "versions": versions("libtpu")}


def _on_cpu(name: str, scan: str) -> Entry:
    found, lowered = _lower(name, "cpu", scan)
    started = time.process_time()
    compiled = lowered.compile()
    return found | {
        "compile_seconds": round(time.process_time() - started, 1),
        "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "memory_traffic": memory_traffic(compiled.as_text()),
    }


def _lower(name: str, target: str, scan: str) -> tuple[Entry, Any]:
    """Runs in a process of its own; says how many seconds that had used when it was done."""
    set_up()
    config = configs.load(name)
    config.model.scan_blocks = scan
    if target == "cpu":
        config.batch_size, config.accumulation_steps = 2, 1
        config.augment.mix_group = config.model.batch_norm_group = 0
        machines: Target = Here("cpu", "cpu", "cpu", jax.devices()[:1])
    else:
        machines = find_target(target)
    started = time.process_time()
    found, lowered = lower(config, machines)
    kept = {name: found[name] for name in ("batch_per_chip", "kernels")}
    seconds = round(time.process_time() - started, 1)
    return kept | {"lower_seconds": seconds, "seconds_before": time.process_time()}, lowered


def _seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def load() -> dict[tuple[str, str, str], Entry]:
    """Entries by config, target and "off" or "on"."""
    entries = json.loads(RESULTS.read_text())["entries"] if RESULTS.exists() else []
    return {(x["config"], x["target"], x["scan_blocks"]): x for x in entries}


def ratios(before: Entry, after: Entry) -> dict[str, float]:
    """How many times less compiling takes, and how many times more memory and traffic."""
    found = {
        "compile": before["compile_seconds"] / after["compile_seconds"],
        "memory": after["temporary_bytes"] / before["temporary_bytes"],
    }
    if "memory_traffic" in after:
        found["traffic"] = after["memory_traffic"] / before["memory_traffic"]
    return found


def main() -> int:
    """Compiles what is missing; 1 if anything failed."""
    return ending(_main, limited=False) or 0


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", default=",".join(CONFIGS))
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--again", action="store_true", help="compile what is there, too")
    options = parser.parse_args()
    set_up()
    entries, failures = load(), 0
    for target in options.targets.split(","):
        if target != "cpu":
            find_target(target)
        for name in options.configs.split(","):
            for scan in ("off", "on"):
                key = (name, target, scan)
                if key in entries and not options.again:
                    continue
                try:
                    entries[key] = entry(*key)
                except compile_only.CompilerError as error:
                    print(f"{' '.join(key)}: {error}", file=sys.stderr)
                    failures += 1
                    continue
                records.save(RESULTS, {"entries": [entries[each] for each in sorted(entries)]})
                shown = {k: v for k, v in entries[key].items() if k != "versions"}
                print(json.dumps(shown, ensure_ascii=False), flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
