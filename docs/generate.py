"""The tables in README.md and docs/, made from the registry, the configs and the last figures.

python -m docs.generate

A table stands in its document between `<!-- generated: NAME -->` and `<!-- end -->`, and what is
between these lines is replaced; the prose around it is written by hand. docs/plans.md is made as a
whole, by `python -m benchmarks.plans --render`, which this command includes.
"""

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any

import configs
import hybrid_flax
from benchmarks import plans, scan_blocks
from hybrid_flax.costs.plan_text import size
from hybrid_flax.models import registry
from hybrid_flax.models.gramian.network import GramianNet
from hybrid_flax.run.ending import ending
from hybrid_flax.training.optimizers import decayed
from hybrid_flax.weights import bridge
from hybrid_flax.weights.paths import flatten

ROOT = pathlib.Path(__file__).parents[1]
PARITY = ROOT / "benchmarks" / "results" / "parity.json"
COMMAND = "python -m docs.generate"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Formats a Markdown table."""
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines).replace("| --- ", "|---")


# ---------------------------------------------------------------------------------------- models
def families() -> str:
    """Tabulates the papers: the beginning of their models' names, how many, how large."""
    papers: dict[str, list[str]] = {}
    for name in hybrid_flax.list_models():
        papers.setdefault(hybrid_flax.model_info(name).paper, []).append(name)
    rows = []
    for paper, names in papers.items():
        title, _, number = paper.rpartition(", arXiv:")
        infos = [hybrid_flax.model_info(name) for name in names]
        sizes = sorted(info.parameters / 1e6 for info in infos)
        top1 = sorted(info.top1 for info in infos if info.top1)
        rows.append(
            [
                f"`{names[0].split('_')[0]}_*`",
                f"[{title}](https://arxiv.org/abs/{number})",
                str(len(names)),
                _span(sizes, ".0f", " M"),
                _span(top1, ".1f", " %"),
            ]
        )
    return table(["family", "paper", "models", "parameters", "published top-1"], rows)


def _span(values: list[float], form: str, unit: str) -> str:
    ends = dict.fromkeys(f"{value:{form}}" for value in (values[:1] + values[-1:]))
    return " – ".join(ends) + unit if ends else "–"


def models() -> str:
    """Tabulates every model: what is published, counted, and measured by `tests.parity`."""
    head = ["model", "top-1", "parameters", "giga-multiply-adds published (counted)"]
    head += ["evaluated at", "logits differ by", "gradients differ by", "released weights"]
    measured = json.loads(PARITY.read_text())

    def by_size(name: str) -> tuple[str, int]:
        return name.split("_")[0], hybrid_flax.model_info(name).parameters

    names = sorted(hybrid_flax.list_models(), key=by_size)
    return table(head, (_model(name, measured) for name in names))


def _model(name: str, measured: dict[str, Any]) -> list[str]:
    info, crop = hybrid_flax.model_info(name), hybrid_flax.model_info(name).eval_transform
    cases = [case for case in measured["cases"] if case["case"].removesuffix(" (train)") == name]
    gradients = [case[key] for case in cases for key in ("norms", "projections") if case[key]]
    counted = measured["multiply_adds"].get(name)
    counted = f"{counted / 1e9:.1f}" if counted else f"`make model NAME={name}` counts"
    logits = f"{max(case['logits'] for case in cases):.0e}" if cases else "not compared"
    released = "none released"
    if info.release_file:
        released = f"[{info.release_file}]({info.release_page})"
    return [
        f"`{name}`",
        f"{info.top1:.1f}" if info.top1 else "–",
        f"{info.parameters / 1e6:.1f} M",
        f"{info.gflops:.1f} ({counted})" if info.gflops else f"– ({counted})",
        f"{info.image_size}, {crop.crop_mode} {crop.crop_fraction:g}",
        logits,
        f"{max(gradients):.0e}" if gradients else "",
        released,
    ]


# --------------------------------------------------------------------------------------- recipes
def rows_of_recipes() -> dict[str, list[str]]:
    """Groups the configs by the row of docs/recipes.md that their docstrings name."""
    rows: dict[str, list[str]] = {}
    for name in plans.by_size():
        text = (ROOT / "configs" / f"{name}.py").read_text()
        row = re.search(r'^Row "(.*)" of docs/recipes\.md', text, re.MULTILINE)
        if not row:
            raise SystemExit(f"configs/{name}.py: its docstring has no line 'Row \"…\" of docs/…'")
        rows.setdefault(row[1], []).append(name)
    return dict(sorted(rows.items()))


def schedules() -> str:
    """Tabulates batch, epochs, rate, clipping, average and optimizer of every recipe."""
    head = ["row", "configs", "images per step", "epochs", "warm-up epochs"]
    head += ["learning rate: first → peak → last", "clip norm", "average", "differences"]
    return table(head, _rows(_schedule))


def _schedule(config) -> list[str]:
    optimizer, schedule = config.optimizer, config.schedule
    peak = f"{optimizer.learning_rate:g}"
    if optimizer.learning_rate_for_batch:
        peak += f" × images/{optimizer.learning_rate_for_batch}"
    ends = f"{schedule.warmup_learning_rate:g} → {peak} → {schedule.min_learning_rate:g}"
    differences = [
        *(["LAMB"] if optimizer.name == "lamb" else []),
        *([f"weight decay {optimizer.weight_decay:g}"] if optimizer.weight_decay != 0.05 else []),
        *([config.model.dtype] if config.model.dtype != "bfloat16" else []),
    ]
    return [
        str(config.batch_size),
        str(config.epochs),
        f"{schedule.warmup_epochs:g}" + ", by the epoch" * schedule.each_epoch,
        ends,
        f"{optimizer.clip_norm:g}" if optimizer.clip_norm else "none",
        f"{config.ema_decay:g}" if config.ema_decay else "none",
        ", ".join(differences),
    ]


def regularisation() -> str:
    """Tabulates drop path, mixing, erasing, filter, loss, groups and repeats of every recipe."""
    head = ["row", "configs", "drop path", "mixup α, cutmix α", "erasing", "resize filter"]
    head += ["loss", "mixed by", "batch statistics of", "repeats"]
    return table(head, _rows(_regularisation))


def _loss(model: str) -> str:
    """Names the loss that follows from what a model returns in training."""
    if getattr(registry.model_variant(model), "token_labelling", False):
        return "token labelling"
    gramian = issubclass(registry.family_of(model).model, GramianNet)
    return "gramian" if gramian else "cross entropy"


def _regularisation(config) -> list[str]:
    augment, loss = config.augment, _loss(config.model.name)
    by_tokens = loss == "token labelling"
    mixing = f"{augment.mixup_alpha:g}, {augment.cutmix_alpha:g}"
    return [
        f"{config.model.drop_path:g}",
        "none; MixToken" if by_tokens else mixing,
        f"{augment.erasing_probability:g}" if augment.erasing_probability else "none",
        {"random": "bilinear or bicubic"}.get(augment.interpolation, augment.interpolation),
        loss,
        "–" if by_tokens else str(augment.mix_group or "whole batch"),
        str(config.model.batch_norm_group or "whole batch"),
        str(augment.repeats),
    ]


def _rows(settings: Callable[[Any], list[str]]) -> list[list[str]]:
    """Makes a line of each row; where its configs differ, each value says whose it is."""
    lines = []
    for row, names in rows_of_recipes().items():
        columns = zip(*(settings(configs.load(name)) for name in names), strict=True)
        cells = []
        for column in columns:
            users: dict[str, list[str]] = {}
            for name, value in zip(names, column, strict=True):
                users.setdefault(value, []).append(name)
            cells.append(
                "; ".join(
                    value if len(users) == 1 else f"{value}: {_short(who, names)}"
                    for value, who in users.items()
                )
            )
        lines.append([row, ", ".join(f"`{name}`" for name in names), *cells])
    return lines


def _short(who: list[str], names: list[str]) -> str:
    """Lists names without the beginning that all of a row share."""
    first, last = min(names), max(names)
    same = 0
    while same < len(first) and first[same] == last[same]:
        same += 1
    same = first.rfind("_", 0, same) + 1
    return ", ".join(name[same:] for name in who)


def decay() -> str:
    """Tabulates what decays besides kernels, and what does not besides biases and norms."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in plans.by_size():
        config = configs.load(name)
        model = bridge.abstract(lambda config=config: hybrid_flax.create_model(config.model.name))
        params = bridge.get_weights(model)["params"]
        kinds: dict[bool, set[str]] = {True: set(), False: set()}
        for path, decays in flatten(decayed(params, config.optimizer)).items():
            leaf = path.rpartition("/")[2]
            if leaf not in ("kernel", "bias", "scale"):
                kinds[bool(decays)].add(re.sub(r"\d+$", "", leaf))
        key = tuple(", ".join(f"`{leaf}`" for leaf in sorted(kinds[b])) for b in (True, False))
        found.setdefault(key, []).append(name)
    rows = [[", ".join(f"`{n}`" for n in sorted(names)), *key] for key, names in found.items()]
    return table(["configs", "decays", "does not decay"], sorted(rows))


# ----------------------------------------------------------------------------------------- costs
def loops() -> str:
    """Tabulates what loops over equal blocks save and cost; a row for each step compiled twice."""
    head = ["config", "target", "seconds to compile", "less by", "temporary memory", "traffic"]
    entries, rows = scan_blocks.load(), []
    for name, target, scan in entries:
        if scan == "on" and (name, target, "off") in entries:
            off, on = (entries[name, target, which] for which in ("off", "on"))
            found = scan_blocks.ratios(off, on)
            seconds = f"{off['compile_seconds']:.0f} → {on['compile_seconds']:.0f}"
            rows.append(
                [f"`{name}`", target, seconds, f"{found['compile']:.1f}×"]
                + [
                    f"{size(off[key])} → {size(on[key])}: {found[what]:.2f}×"
                    if what in found
                    else "not counted"
                    for key, what in (("temporary_bytes", "memory"), ("memory_traffic", "traffic"))
                ]
            )
    return table(head, rows)


# ------------------------------------------------------------------------------------- documents
TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"families": families},
    "docs/costs.md": {"scan_blocks": loops},
    "docs/models.md": {"models": models},
    "docs/recipes.md": {
        "schedules": schedules,
        "regularisation": regularisation,
        "decay": decay,
    },
}


def generated(document: str) -> str:
    """Returns a document's text with its tables as they should be."""
    text = (ROOT / document).read_text()
    for name, make in TABLES[document].items():
        begin, end = f"<!-- generated: {name} -->\n", "\n<!-- end -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{document} has no lines {begin.strip()} and {end.strip()}")
        made = begin + make() + end
        text = pattern.sub(lambda match, made=made: made, text)
    return text


def main() -> None:
    """Rewrites all documents that have generated tables."""
    for document in TABLES:
        (ROOT / document).write_text(generated(document))
    plans.render()


def _program() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()  # --help only
    main()


if __name__ == "__main__":
    sys.exit(ending(_program, limited=False))
