"""How firm a model stands: invariance, receptive fields, robustness, as plots and JSON.

python -m hybrid_flax.analyse --workdir=DIR[,DIR…] --out=DIR [--what=invariance,erf,robustness]

The study of Hu et al. (arXiv:2211.05781) on the validation split of a run: views moved by 0 to 64
pixels in all eight directions, turned by 0 to 90 degrees before and after the crop, scaled by 0.2
to 1.95; FGSM and PGD with ε from 1 to 8 of 255; effective receptive fields of every stage. A view
follows from (--seed, image, strength). Standard errors are over the images. Several runs come into
one plot. What is finished is in OUT/NAME.json after each strength; started again, it goes on.
--as_published repeats the study's own protocol: its crop of 0.875, its seven directions as NumPy
draws them, its view of strength 0.
"""

import io
import os
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import flags
from tqdm import tqdm

from hybrid_flax import cli
from hybrid_flax.analysis import invariance
from hybrid_flax.analysis.curves import (
    BUDGETS,
    PGD_STEP,
    PGD_STEPS,
    Kept,
    Task,
    invariance_curves,
    receptive_fields,
    robustness_curves,
    strengths,
)
from hybrid_flax.analysis.layers import stage_maps
from hybrid_flax.data.sources.part import Subset
from hybrid_flax.errors import InputError
from hybrid_flax.run import files
from hybrid_flax.start import open_trained
from hybrid_flax.text_files import check_local
from hybrid_flax.weights import bridge
from hybrid_flax.weights.functions import as_function

WHAT = ("invariance", "erf", "robustness")
ERF_IMAGES = 50  # as RepLKNet's script


class Study(NamedTuple):
    """What is asked for."""

    out: str
    what: tuple[str, ...] = WHAT
    kinds: tuple[str, ...] = tuple(invariance.GRID)
    images: int = 0  # of the split, the first; 0: all
    seed: int = 0
    as_published: bool = False


def check(study: Study) -> None:
    """Raises InputError for what cannot be asked for."""
    check_local(study.out, "--out")
    if not study.out:
        raise InputError("--out is missing: expected a folder for plots and numbers")
    for flag, given, known in (
        ("what", study.what, WHAT),
        ("kinds", study.kinds, tuple(invariance.GRID)),
    ):
        unknown = [each for each in given if each not in known]
        if unknown or not given:
            raise InputError(f"--{flag}={','.join(given)}: expected some of {', '.join(known)}")
    if study.images < 0:
        raise InputError(f"--limit={study.images}: expected how many images, or 0 for all")
    if jax.process_count() > 1:
        raise InputError("analyse is one process, on all its devices")


def analyse(name: str, task: Task, study: Study) -> Kept:
    """Runs what is asked for on one model, and keeps the numbers in OUT/NAME.json."""
    settings = {
        "model": task.settings.model.name,
        "run": name,
        "dataset": task.settings.dataset.name,
        "images": len(task.source),
        "image_size": task.settings.model.image_size,
        "crop_fraction": invariance.FRACTION
        if study.as_published
        else task.settings.eval.crop_fraction,
        "seed": study.seed,
        "as_published": study.as_published,
        "pgd": f"{PGD_STEPS} steps of {PGD_STEP} ε, no random start",
    }
    kept = Kept(os.path.join(study.out, f"{name}.json"), settings)
    size = task.settings.model.image_size
    total = sum(len(strengths(kind, size)) for kind in study.kinds) * ("invariance" in study.what)
    total += 2 * (1 + len(BUDGETS)) * ("robustness" in study.what)
    total += len(stage_maps(task.model)) * ("erf" in study.what)
    with tqdm(total=total, desc=name, disable=None) as bar:

        def told(what: str) -> None:
            bar.set_postfix_str(what)
            bar.update()

        if "invariance" in study.what:
            invariance_curves(task, kept, study.kinds, told)
        if "robustness" in study.what:
            robustness_curves(task, kept, told)
        if "erf" in study.what:
            found = receptive_fields(task, kept, min(ERF_IMAGES, len(task.source)), size, told)
            files.replace(os.path.join(study.out, f"{name}_erf.png"), _erf_plot(name, found, kept))
    return kept


def _erf_plot(name: str, found: dict[str, np.ndarray], kept: Kept) -> bytes:
    from hybrid_flax.pictures.canvas import figure, heat

    panels = []
    for layer, scores in found.items():
        area = kept.results[f"erf {layer}"]["area"]["of the contributions"]["0.5"]
        share = "none" if area is None else f"{area[1]:.3f}"
        panels.append(heat(np.sqrt(scores), None, f"{layer}: half in {share} of the image"))
    size, images = (kept.results[f"erf {layer}"][key] for key in ("image_size", "images"))
    caption = (
        f"{name}. Effective receptive field of the middle of each map, square root of the "
        f"contributions, mean over {images} images squashed to {size}×{size} pixels. Compare "
        "only at equal size."
    )
    stream = io.BytesIO()
    figure(panels, caption).save(stream, "PNG")
    return stream.getvalue()


_AXES = {
    "translate": "crop moved by (pixels);\nbeyond {0}, the content by half of the rest",
    "rotate_before": "turned before the crop (degrees)",
    "rotate_after": "turned after the crop (degrees)",
    "scale": "crop fraction",
}
_SCORES = {
    "top1": "top-1 (%)",
    "consistency": "consistency with the standard view (%)",
    "divergence": "divergence from it (nats)",
}


def invariance_plot(every: Sequence[Kept], kinds: Sequence[str]) -> bytes:
    """One row a kind of view, one column a score, one line a model; bars are standard errors."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(
        len(kinds),
        len(_SCORES),
        figsize=(5 * len(_SCORES), 3.4 * len(kinds)),
        layout="constrained",
        squeeze=False,
    )
    for row, kind in zip(axes, kinds, strict=True):
        for cell, (score, label) in zip(row, _SCORES.items(), strict=True):
            for kept in every:
                points = _points(kept, kind, score)
                cell.errorbar(*points, marker=".", capsize=2, label=kept.settings["run"])
            size, fraction = (every[0].settings[key] for key in ("image_size", "crop_fraction"))
            cell.set_xlabel(_AXES[kind].format(int(size / fraction - size) // 2))
            cell.set_ylabel(label)
            cell.grid(alpha=0.3)
    axes[0, 0].legend()
    return _drawn(figure, pyplot)


def _points(kept: Kept, kind: str, score: str) -> tuple[list[float], list[float], list[float]]:
    found = {
        float(key.rpartition(" ")[2]): values[score]
        for key, values in kept.results.items()
        if key.rpartition(" ")[0] == kind
    }
    strengths = sorted(found)
    return strengths, [found[x][0] for x in strengths], [found[x][1] for x in strengths]


def robustness_plot(every: Sequence[Kept]) -> bytes:
    """Accuracy and loss by the budget of the attack."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for kept in every:
        for attack, style in (("fgsm", "--"), ("pgd", "-")):
            for cell, score in zip(axes, ("top1", "loss"), strict=True):
                label = f"{kept.settings['run']}, {attack}"
                points = _points(kept, attack, score)
                cell.errorbar(*points, linestyle=style, marker=".", capsize=2, label=label)
    for cell, label in zip(axes, ("top-1 (%)", "loss (nats)"), strict=True):
        cell.set_xlabel("ε (of 255)")
        cell.set_ylabel(label)
        cell.grid(alpha=0.3)
    axes[0].legend()
    return _drawn(figure, pyplot)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def _drawn(figure: Any, pyplot: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=90)
    pyplot.close(figure)
    return stream.getvalue()


def open_task(
    config: ml_collections.ConfigDict | None,
    workdir: str,
    study: Study,
    given: Collection[str] | None = None,
) -> Task:
    """Opens the best weights of a run and its validation split, or the first images of it."""
    found = open_trained(config, workdir, "val", given)
    settings, source, mesh, model = found.prepared
    if 0 < study.images < len(source):
        source = Subset(source, np.arange(study.images))
    apply = as_function(model)
    bridge.set_weights(model, jax.device_get(found.best))
    return Task(
        workdir,
        model,
        found.best,
        apply,
        source,
        settings,
        mesh,
        study.seed,
        study.as_published,
    )


def _run_names(workdirs: Sequence[str]) -> list[str]:
    """A short name for each run: its folder's, with a number where two are called the same."""
    names = [os.path.basename(os.path.abspath(workdir)) for workdir in workdirs]
    return [name if names.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(names)]


def main(
    config: ml_collections.ConfigDict | None,
    workdir: str,
    study: Study,
    given: Collection[str] | None = None,
) -> int:
    """Analyses one run after the other and draws them together.

    Args:
      config, given: see `as_trained`.
      workdir: of a run, or of several with commas between.
    """
    check(study)
    workdirs = [part for part in workdir.split(",") if part]
    os.makedirs(study.out, exist_ok=True)
    every = []
    for name, each in zip(_run_names(workdirs), workdirs, strict=True):
        every.append(analyse(name, open_task(config, each, study, given), study))
    plots = []
    if "invariance" in study.what:
        plots.append(("invariance.png", invariance_plot(every, study.kinds)))
    if "robustness" in study.what:
        plots.append(("robustness.png", robustness_plot(every)))
    for file, drawn in plots:
        files.replace(os.path.join(study.out, file), drawn)
    print(f"numbers (JSON) and plots (PNG) of {len(every)} model(s) are in {study.out}")
    return 0


def _study() -> Study:
    values = flags.FLAGS
    listed = {
        name: tuple(filter(None, getattr(values, name).split(","))) for name in ("what", "kinds")
    }
    return Study(
        os.path.expanduser(values.out),
        listed["what"],
        listed["kinds"],
        values.limit,
        values.seed,
        values.as_published,
    )


if __name__ == "__main__":
    flags.DEFINE_string("out", "", "Folder for plots and numbers.")
    flags.DEFINE_string("what", ",".join(WHAT), "Which analyses.")
    flags.DEFINE_string("kinds", ",".join(invariance.GRID), "Which views of the invariance.")
    flags.DEFINE_integer("limit", 0, "The first so many images; 0: all.")
    flags.DEFINE_integer("seed", 0, "Of the directions in which crops move.")
    flags.DEFINE_boolean("as_published", False, "The study's own protocol, to the pixel.")
    cli.run(
        lambda config, workdir: main(config, workdir, _study(), cli.given_fields()),
        needs_config=False,
    )
