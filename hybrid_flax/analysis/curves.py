"""Curves over a validation split: invariance, robustness, receptive fields; each restartable.

A subject answers batches of uint8 images. What is finished is kept in a file after every strength,
and a program that begins again goes on behind it.
"""

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from hybrid_flax.analysis import attacks, invariance, receptive_field
from hybrid_flax.analysis.layers import stage_maps
from hybrid_flax.data.images import FILTERS, UnreadableImageError, rgb
from hybrid_flax.data.loader import eval_batches
from hybrid_flax.data.sources import Source
from hybrid_flax.data.transforms import EvalTransform, Example
from hybrid_flax.distributed.batch import batch_sharded, round_up, to_devices
from hybrid_flax.distributed.mesh import on_mesh, replicated
from hybrid_flax.errors import InputError
from hybrid_flax.models.backbone import Backbone
from hybrid_flax.run import files
from hybrid_flax.settings import Settings
from hybrid_flax.text_files import read_json
from hybrid_flax.training.batch_augmentation import normalise

BUDGETS = (1, 2, 4, 8)  # ε of attacks, of 255
PGD_STEPS, PGD_STEP = 10, 0.25  # how many, and their size as a part of ε
Told = Callable[[str], None]


class Task(NamedTuple):
    """A model and the images that it is asked about."""

    name: str
    model: Backbone  # with its weights
    weights: Any  # on the mesh
    apply: Callable[..., Array]
    source: Source
    settings: Settings
    mesh: Mesh
    seed: int
    as_published: bool


@dataclasses.dataclass(frozen=True)
class ViewTransform(EvalTransform):
    """A view of each image in place of the evaluation crop."""

    kind: str = "standard"
    strength: float = 0
    seed: int = 0
    as_published: bool = False

    def __call__(self, index: int) -> Example:
        if self.kind == "standard" and not self.as_published:
            return super().__call__(index)  # the model's own evaluation crop
        if index >= len(self.source):
            return self._nothing(0)
        try:
            photo, label = self.source[int(index)]
            photo = rgb(photo)
        except UnreadableImageError:
            if not self.skip_unreadable:
                raise
            return self._nothing(index)
        view = invariance.transformed(
            photo,
            self.kind,
            self.strength,
            direction=self._direction(int(index)),
            image_size=self.image_size,
            interpolation=self.interpolation,
            fraction=invariance.FRACTION if self.as_published else self.crop_fraction,
            as_published=self.as_published,
        )
        row = {"label": np.int32(label), "index": np.int32(index), "mask": np.float32(1)}
        return {"image": view, **row}

    def _direction(self, index: int) -> int:
        if self.kind != "translate":
            return 0
        if self.as_published:
            return invariance.published_direction(self.seed, index, self.strength)
        return invariance.drawn_direction(self.seed, index, self.strength)


def _view(task: Task, kind: str, strength: float) -> ViewTransform:
    crop = EvalTransform.from_config(task.settings, task.source)
    fields = {field.name: getattr(crop, field.name) for field in dataclasses.fields(crop)}
    return ViewTransform(
        **fields, kind=kind, strength=strength, seed=task.seed, as_published=task.as_published
    )


def _batches(task: Task, transform: EvalTransform) -> Iterator[dict[str, np.ndarray]]:
    batches = eval_batches(
        transform,
        batch_size=round_up(task.settings.eval.batch_size, task.mesh),
        num_workers=task.settings.dataset.num_workers,
    )
    with contextlib.closing(batches):
        yield from batches


def logits_on(task: Task, step: Callable, transform: EvalTransform) -> tuple[np.ndarray, ...]:
    """(logits, labels, numbers) of the images that can be read."""
    found: list[tuple[np.ndarray, ...]] = []
    for batch in _batches(task, transform):
        images = to_devices({"image": batch["image"]}, task.mesh)["image"]
        logits, rows = np.asarray(step(task.weights, images)), batch["mask"] > 0
        found.append((logits[rows], batch["label"][rows], batch["index"][rows]))
    return tuple(np.concatenate(each) for each in zip(*found, strict=True))


def make_step(task: Task) -> Callable:
    """Compiles `step(weights, uint8 images) → logits`, float32, as the run evaluates."""
    mean, std = task.settings.dataset.mean, task.settings.dataset.std

    @on_mesh(task.mesh)
    def step(weights, images):
        return task.apply(weights, normalise(images, mean, std)).astype(jnp.float32)

    return jax.jit(
        step,
        in_shardings=(None, batch_sharded(task.mesh)),
        out_shardings=replicated(task.mesh),
    )


class Kept:
    """Results in a JSON file, which is written after each; those of other settings are refused."""

    def __init__(self, file: str, settings: dict[str, Any]):
        self._file, self.settings = file, settings
        self.results: dict[str, Any] = {}
        if os.path.exists(file):
            found = read_json(file)
            if not isinstance(found, dict) or found.get("settings") != settings:
                raise InputError(
                    f"{file} holds results of other settings. Give another --out, or delete it"
                )
            self.results = found["results"]

    def add(self, key: str, value: Any) -> None:
        self.results[key] = value
        content = {"settings": self.settings, "results": self.results}
        files.replace(self._file, json.dumps(content, indent=1).encode() + b"\n")


def strengths(kind: str, image_size: int) -> list[float]:
    """The study's strengths of a kind of view, but for moves beyond the image."""
    every = invariance.GRID[kind]
    return [each for each in every if kind != "translate" or each < image_size]


def invariance_curves(task: Task, kept: Kept, kinds: Sequence[str], told: Told) -> None:
    """Scores every kind and strength: {"translate 8": {score: [mean, standard error]}}."""
    size = task.settings.model.image_size
    wanted = [(kind, strength) for kind in kinds for strength in strengths(kind, size)]
    wanted = [each for each in wanted if _key(*each) not in kept.results]
    if not wanted:
        return
    step = make_step(task)
    standard, labels, numbers = logits_on(task, step, _view(task, "standard", 0))
    for kind, strength in wanted:
        logits, _, own = logits_on(task, step, _view(task, kind, strength))
        if not np.array_equal(own, numbers):
            raise InputError(f"{_key(kind, strength)}: other images can be read than before")
        values = invariance.per_image(logits, standard, labels)
        kept.add(
            _key(kind, strength),
            {
                name: [float(each.mean()), invariance.standard_error(each)]
                for name, each in values.items()
            },
        )
        told(_key(kind, strength))


def _key(kind: str, strength: float) -> str:
    return f"{kind} {strength:g}"


def robustness_curves(task: Task, kept: Kept, told: Told) -> None:
    """Accuracy and loss under attack: {"fgsm 4": {"top1": [mean, error], "loss": …}}."""
    wanted = [(name, budget) for name in ("fgsm", "pgd") for budget in (0, *BUDGETS)]
    compiled = {name: _attack(task, name) for name in ("fgsm", "pgd")}
    for name, budget in wanted:
        if f"{name} {budget}" in kept.results:
            continue
        attack = functools.partial(compiled[name], np.float32(budget / 255))
        right, loss = [], []
        for batch in _batches(task, EvalTransform.from_config(task.settings, task.source)):
            arrays = to_devices({name: batch[name] for name in ("image", "label")}, task.mesh)
            one, two = map(np.asarray, attack(task.weights, arrays["image"], arrays["label"]))
            rows = batch["mask"] > 0
            right.append(100.0 * one[rows])
            loss.append(two[rows].astype(np.float64))
        found = {"top1": np.concatenate(right), "loss": np.concatenate(loss)}
        kept.add(
            f"{name} {budget}",
            {
                key: [float(each.mean()), invariance.standard_error(each)]
                for key, each in found.items()
            },
        )
        told(f"{name} {budget}")


def _attack(task: Task, name: str) -> Callable:
    """Compiles `attack(ε, weights, uint8 images, labels) → (whether it is right, loss)`."""
    mean, std = (
        np.asarray(each, np.float32).reshape(1, 1, 1, 3)
        for each in (task.settings.dataset.mean, task.settings.dataset.std)
    )

    @on_mesh(task.mesh)
    def attacked(epsilon, weights, images, labels):
        def logits_of(pixels):
            return task.apply(weights, (pixels - mean) / std)

        pixels = images.astype(jnp.float32) / 255
        if name == "fgsm":
            pixels = attacks.fgsm(logits_of, pixels, labels, epsilon)
        else:
            step = PGD_STEP * epsilon
            pixels = attacks.pgd(logits_of, pixels, labels, epsilon, step, PGD_STEPS)
        logits = logits_of(pixels)
        return logits.argmax(-1) == labels, attacks.losses(logits, labels)

    sharding = batch_sharded(task.mesh)
    return jax.jit(
        attacked,
        in_shardings=(None, None, sharding, sharding),
        out_shardings=replicated(task.mesh),
    )


def receptive_fields(
    task: Task, kept: Kept, images: int, size: int, told: Told
) -> dict[str, np.ndarray]:
    """{map: contributions [H, W]}, the mean over the first images, squashed to a square."""
    found: dict[str, np.ndarray] = {}
    pixels = _squashed(task, images, size)
    for layer in stage_maps(task.model):
        total, count = np.zeros((size, size)), 0
        for photo in pixels:
            image = (
                photo[None].astype(np.float32) / 255 - np.asarray(task.settings.dataset.mean)
            ) / (np.asarray(task.settings.dataset.std))
            total += receptive_field.effective_receptive_field(
                task.model, image.astype(np.float32), layer
            )
            count += 1
        found[layer] = (total / count).astype(np.float32)
        ratios = {
            name: {str(t): value and list(value) for t, value in each.items()}
            for name, each in (
                ("of the contributions", receptive_field.area_ratios(found[layer])),
                (
                    "of their logarithm, as RepLKNet",
                    receptive_field.area_ratios(receptive_field.logarithmic(found[layer])),
                ),
            )
        }
        kept.add(f"erf {layer}", {"image_size": size, "images": count, "area": ratios})
        told(f"erf {layer}")
    return found


def _squashed(task: Task, images: int, size: int) -> list[np.ndarray]:
    found = []
    for index in range(min(images, len(task.source))):
        with contextlib.suppress(UnreadableImageError):
            photo, _ = task.source[index]
            found.append(np.asarray(rgb(photo).resize((size, size), FILTERS["bicubic"])))
    if not found:
        raise InputError(f"none of the first {images} images can be read")
    return found
