"""Measures what a model costs on this machine: parameters, FLOP, images per second, memory.

python -m hybrid_flax.benchmark --model=gcvit_b [--batch_sizes=32,64,128] [--against=xla]

On one device, with random images that are already there, in rounds: every round gives each
subject a few steps, and medians over the rounds are printed.

- inference: normalised images to logits, dropping nothing.
- training: the step of `hybrid_flax.train`: uint8 images, normalised; forward with the model's own
  drop path; its own loss with label smoothing; backward; AdamW; the norm of the gradient. Without
  what a recipe may add: mixing, erasing, clipping, an average of the weights.

Multiply-adds are what papers call FLOPs; FLOP here are two for each of them. MFU counts three
forward passes for a training step. Memory is what the compiled program needs, weights included.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax

from hybrid_flax.costs import chips, records, timing
from hybrid_flax.costs.subjects import Subject
from hybrid_flax.costs.timm_subject import TimmSubject
from hybrid_flax.errors import InputError
from hybrid_flax.models import registry
from hybrid_flax.run import compilation_cache
from hybrid_flax.run.ending import ending
from pallas.dispatch import IMPLEMENTATIONS

PASSES = {"inference": 2, "training": 6}  # FLOPs for each multiply-add of the forward pass
STEPS_A_ROUND = 4  # waited for once, so that the host can run ahead as it does in training
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def rows(
    models: list[Subject | TimmSubject], batch_sizes: list[int], steps: int
) -> Iterator[dict[str, Any]]:
    """Measures; a row for every batch size, pass and subject. The first model is the measure.

    A subject that ran out of memory is left out of larger batches; the table ends with the
    first model.
    """
    repeats, full = min(STEPS_A_ROUND, steps), set[tuple[str, str]]()
    for batch in batch_sizes:
        for pass_ in PASSES:
            memory: dict[str, int] = {}
            builders: dict[str, Callable[[], Callable[[], Any]]] = {}
            for model in models:
                builders |= model.builders(batch, pass_, repeats, memory)
            builders = {who: builders[who] for who in builders if (pass_, who) not in full}
            ours = models[0].label
            if ours not in builders:
                continue
            compared = timing.compare(builders, turns=steps // repeats, repeats=repeats)
            for who in builders:
                row = {"batch": batch, "pass": pass_, "who": who}
                if who in compared.failed:
                    row["failed"] = compared.failed[who]
                    if compared.failed[who] == timing.OUT_OF_MEMORY:
                        full.add((pass_, who))
                else:
                    row["seconds"] = compared.seconds[who]
                    row["images_per_second"] = batch / compared.seconds[who]
                    row["bytes"] = memory.get(who)
                    if who != ours and ours in compared.seconds:
                        row["ours_is_faster"] = compared.seconds[who] / compared.seconds[ours]
                yield row


def mfu(row: dict[str, Any], multiply_adds: int, dtype: str) -> float | None:
    """Divides the model's FLOP by the chip's; None for float32 and chips without figures."""
    chip = chips.chip()
    if not chip or dtype != "bfloat16" or "failed" in row:
        return None
    return PASSES[row["pass"]] * multiply_adds * row["images_per_second"] / chip.flops


HEADER = (
    f"{'batch':>6}  {'pass':<10} {'who':<14} {'images/s':>9} {'ms':>9} {'MFU':>6} {'GiB':>7}  ours"
)


def show(row: dict[str, Any]) -> str:
    """Writes a line of the table."""
    line = f"{row['batch']:>6}  {row['pass']:<10} {row['who']:<14} "
    if "failed" in row:
        return line + row["failed"]
    share = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
    memory = "" if row["bytes"] is None else f"{row['bytes'] / 2**30:.2f}"
    ratio = f"{row['ours_is_faster']:.2f}×" if "ours_is_faster" in row else ""
    line += f"{row['images_per_second']:>9.1f} {1e3 * row['seconds']:>9.2f} {share:>6} {memory:>7}"
    return f"{line}  {ratio}".rstrip()


def other_subject(
    against: str, options: argparse.Namespace, ours: Subject
) -> Subject | TimmSubject:
    """Makes the model that `--against` names; raises InputError."""
    if against == "xla":
        return make_ours(options, "xla", "xla")
    repository, _, name = against.removeprefix("torch:").partition("/")
    if not against.startswith("torch:") or repository != "timm" or not name:
        raise InputError(
            f"--against={against}: expected xla, or torch:timm/NAME such as torch:timm/gcvit_base"
        )
    return TimmSubject(
        name,
        image_size=ours.side,
        dtype=options.dtype,
        drop_path=registry.model_variant(options.model).drop_path,
        compile_mode=options.compile_mode,
    )


def check_kernels(ours: Subject) -> None:
    """Raises InputError if the kernels that were asked for do not serve every shape here."""
    refused = [entry for entry in ours.operations() if entry["kernel"] is None]
    if refused:
        raise InputError(
            f"--implementation=pallas: no kernel serves {refused[0]['shape']} here: "
            f"{refused[0]['why']}. Take auto, which runs XLA there, or xla"
        )


def make_ours(options: argparse.Namespace, label: str, implementation: str) -> Subject:
    """Makes the model with this implementation of its operations; raises InputError."""
    return Subject(
        label,
        options.model,
        image_size=options.image_size,
        dtype=options.dtype,
        implementation=implementation,
        scan_blocks=options.scan_blocks,
    )


def batch_sizes(text: str) -> list[int]:
    """Reads "32,64" for argparse, in ascending order."""
    return sorted({records.positive(part) for part in text.split(",")})


def main(arguments: list[str] | None = None) -> int:
    return ending(lambda: _main(arguments), limited=False) or 0


def _main(arguments: list[str] | None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="one of hybrid_flax.list_models()")
    parser.add_argument("--batch_sizes", type=batch_sizes, default=[32, 64, 128], help="32,64,128")
    parser.add_argument("--image_size", type=records.positive, help="default: the model's own")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--implementation",
        choices=IMPLEMENTATIONS,
        default="auto",
        help="of windowed attention and deformable sampling: pallas/*/choice.py",
    )
    parser.add_argument(
        "--scan_blocks",
        choices=("auto", "on", "off"),
        default="auto",
        help="equal blocks as a loop: hybrid_flax/scan_choice.py",
    )
    parser.add_argument("--attention", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    parser.add_argument("--against", help="xla, or torch:timm/NAME, beside it in the same rounds")
    parser.add_argument("--compile_mode", choices=COMPILE_MODES, default="max-autotune")
    parser.add_argument("--save", type=pathlib.Path, help="file for the figures")
    parser.add_argument("--json", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=records.positive, default=20, help="of each subject")
    parser.add_argument("--compilation_cache", help=compilation_cache.HELP)
    options = parser.parse_args(arguments)
    if options.attention:
        print("--attention is now --implementation", file=sys.stderr)
        options.implementation = options.attention
    if options.json:
        print("--json is now --save", file=sys.stderr)
        options.save = options.json
    if options.against:  # JAX would take most of the memory at once, and leave none to PyTorch
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    records.check_file("--save", options.save)
    ours = make_ours(options, "ours", options.implementation)
    if options.implementation == "pallas":
        check_kernels(ours)
    others = [other_subject(options.against, options, ours)] if options.against else []
    with compilation_cache.cached(options.compilation_cache, compilation_cache.user_folder()):
        return run(options, ours, others)


def run(options: argparse.Namespace, ours: Subject, others: list[Subject | TimmSubject]) -> int:
    """Prints, measures, saves. Exit status 1 if the model itself failed, but for want of memory."""
    record = {
        **records.record("torch", "timm"),
        "model": options.model,
        "image_size": ours.side,
        "dtype": options.dtype,
        "parameters": ours.parameters(),
        "multiply_adds": ours.multiply_adds(),
        "operations": ours.operations(),
        "rows": [],
    }
    giga = record["multiply_adds"] / 1e9
    print(
        f"{options.model} on {record['device']}, {options.dtype}: {record['parameters'] / 1e6:.1f} "
        f"M parameters; an image of {ours.side}×{ours.side} takes "
        f"{giga:.1f} giga-multiply-adds ({2 * giga:.1f} GFLOP)"
    )
    for entry in record["operations"]:
        print(
            f"  {entry['count']:>2} × {entry['shape']}: {entry['kernel'] or 'XLA'}, {entry['why']}"
        )
    print(HEADER)
    for row in rows([ours, *others], options.batch_sizes, options.steps):
        row["mfu"] = mfu(row, record["multiply_adds"], options.dtype)
        stats = jax.devices()[0].memory_stats() or {}
        row["device_peak_bytes"] = stats.get("peak_bytes_in_use")  # of this process, until now
        record["rows"].append(row)
        print(show(row), flush=True)
        if options.save:  # after every row: what was measured is not lost when the next fails
            records.save(options.save, record)
    broken = (row.get("failed") for row in record["rows"] if row["who"] == ours.label)
    return int(any(why not in (None, timing.OUT_OF_MEMORY) for why in broken))


if __name__ == "__main__":
    sys.exit(main())
