"""What a model says of every image of a set, and what it is worth."""

import contextlib
import csv
import functools
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from hybrid_flax.data.loader import eval_batches
from hybrid_flax.data.transforms import EvalTransform
from hybrid_flax.distributed.batch import batch_sharded, round_up, to_devices
from hybrid_flax.distributed.mesh import on_mesh, replicated
from hybrid_flax.errors import InputError
from hybrid_flax.evaluation.sets import ALEXNET, Part
from hybrid_flax.training.batch_augmentation import normalise
from hybrid_flax.weights.functions import as_function

AVERAGES = ("flips", "crops")


class Answers(NamedTuple):
    """What a model says of images that could be read, one entry each."""

    images: list[str]
    best: Int[np.ndarray, "N 5"]  # numbers of classes, the best first
    right1: Bool[np.ndarray, "N"]
    right5: Bool[np.ndarray, "N"]
    loss: Float[np.ndarray, "N"]  # cross entropy against the first accepted class, nats

    def metrics(self) -> dict[str, float]:
        """Percents, and how many images they are of."""
        return {
            "top1": 100 * float(self.right1.mean()),
            "top5": 100 * float(self.right5.mean()),
            "loss": float(self.loss.mean()),
            "images": len(self.images),
        }


def check_average(average: Sequence[str]) -> None:
    """Raises InputError for views that are none of `AVERAGES`."""
    unknown = [each for each in average if each not in AVERAGES]
    if unknown:
        raise InputError(f"--average={','.join(unknown)}: expected some of {', '.join(AVERAGES)}")


def make_logit_step(apply: Callable, mean, std, mesh: Mesh, image_size: int, average=()):
    """Compiles `step(weights, uint8 images) → logits [B, classes]`, float32.

    With "flips" the logits are the mean of the image's and its mirror image's; with "crops"
    those of the middle and the four corners of images that are larger than `image_size`.
    """

    def views(images: Array) -> list[Array]:
        found = [images]
        if "crops" in average:
            rest = images.shape[1] - image_size
            places = [(0, 0), (0, rest), (rest, 0), (rest, rest), (rest // 2, rest // 2)]
            found = [images[:, y : y + image_size, x : x + image_size] for y, x in places]
        return found + ([each[:, :, ::-1] for each in found] if "flips" in average else [])

    @on_mesh(mesh)
    def logit_step(weights, images):
        found = views(normalise(images, mean, std))
        return sum(apply(weights, each).astype(jnp.float32) for each in found) / len(found)

    return jax.jit(
        logit_step,
        in_shardings=(None, batch_sharded(mesh)),
        out_shardings=replicated(mesh),
    )


def widened(transform: EvalTransform, average: Sequence[str]) -> EvalTransform:
    """The transform that keeps all that crops are cut from; itself without "crops"."""
    if "crops" not in average:
        return transform
    side = math.floor(transform.image_size / transform.crop_fraction)
    return EvalTransform(
        **{
            **{name: getattr(transform, name) for name in transform.__dataclass_fields__},
            "image_size": side,
            "crop_fraction": 1.0,
        }
    )


def answers(
    step: Callable[[Array], Array],
    part: Part,
    transform: EvalTransform,
    mesh: Mesh,
    batch_size: int,
    classes: Int[np.ndarray, "K"] | None = None,
    num_workers: int = 0,
    seen: Callable[[int], None] = lambda count: None,
) -> Answers:
    """Asks the model about every image that can be read.

    Args:
      step: uint8 images [B, H, W, 3] → logits [B, classes].
      transform: of `part.source`.
      batch_size: of images at a time; rounded up to what the mesh splits.
      classes: those that take part, where not all do: the others' logits are left out, as the sets
        of 200 classes are defined, and the loss is over them alone.
      seen: told how many images are done.

    Raises:
      InputError: no image can be read; labels beyond the model's classes; logits that are not
        finite.
    """
    images: list[str] = []
    best, right1, right5, loss = [], [], [], []
    batches = eval_batches(
        transform, batch_size=round_up(batch_size, mesh), num_workers=num_workers
    )
    with contextlib.closing(batches):
        for batch in batches:
            logits = np.asarray(step(to_devices({"image": batch["image"]}, mesh)["image"]))
            rows = np.flatnonzero(batch["mask"] > 0)
            numbers = batch["index"][rows]
            accepted = (
                [(int(label),) for label in batch["label"][rows]]
                if part.accepted is None
                else [part.accepted[int(number)] for number in numbers]
            )
            _check(logits[rows], accepted)
            ranked, losses = _ranked(logits[rows], accepted, classes)
            hits = [np.isin(ranked[i], each) for i, each in enumerate(accepted)]
            images += [part.source.name(int(number)) for number in numbers]
            best.append(ranked)
            right1 += [bool(each[0]) for each in hits]
            right5 += [bool(each.any()) for each in hits]
            loss += losses.tolist()
            seen(len(rows))
    return Answers(images, np.concatenate(best), np.array(right1), np.array(right5), np.array(loss))


def _check(logits: np.ndarray, accepted: Sequence[Sequence[int]]) -> None:
    largest = max((max(each) for each in accepted), default=0)
    if largest >= logits.shape[1]:
        raise InputError(
            f"the set has the class {largest}, but the model has {logits.shape[1]} classes"
        )
    if not np.isfinite(logits).all():
        raise InputError("the model's logits are NaN or infinite: nothing can be scored")


def _ranked(logits: np.ndarray, accepted, classes) -> tuple[np.ndarray, np.ndarray]:
    """(the five best classes of each image, losses)."""
    numbers = np.arange(logits.shape[1]) if classes is None else np.asarray(classes)
    own = logits[:, numbers].astype(np.float64)
    order = np.argsort(-own, axis=-1, kind="stable")[:, :5]
    shifted = own - own.max(-1, keepdims=True)
    log_shares = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    place = {int(number): i for i, number in enumerate(numbers)}
    losses = [-log_shares[i, place[each[0]]] for i, each in enumerate(accepted)]
    return numbers[order], np.array(losses)


def corruption_error(errors: Mapping[str, Sequence[float]]) -> float:
    """mCE in percent: errors over the severities by AlexNet's, in the mean over corruptions.

    (Hendrycks and Dietterich, arXiv:1903.12261, section 4.)

    Args:
      errors: {corruption: error at each of the five severities, from 0 to 1}.
    """
    ratios = [np.mean(errors[corruption]) / alexnet for corruption, alexnet in ALEXNET.items()]
    return 100 * float(np.mean(ratios))


# ---------------------------------------------------------------------------- per-image files

_HEAD = ("image", *(f"class{i}" for i in range(1, 6)), "right1", "right5", "loss")


def as_csv(found: Answers) -> str:
    """One line an image: its file, the five best classes, whether they are right, the loss."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_HEAD)
    for i, image in enumerate(found.images):
        cells = [*found.best[i].tolist(), *[""] * (5 - found.best.shape[1])]
        writer.writerow(
            [image, *cells, int(found.right1[i]), int(found.right5[i]), f"{found.loss[i]:.6f}"]
        )
    return stream.getvalue()


class Comparison(NamedTuple):
    """Two models on the same images."""

    images: int
    first: float  # top-1, percent
    second: float
    only_first: int  # images that it alone has right
    only_second: int
    p_value: float  # McNemar's exact test, two-sided


def compare(first: Iterable[tuple[str, bool]], second: Iterable[tuple[str, bool]]) -> Comparison:
    """Compares what two models have right, image by image.

    Args:
      first, second: (image, whether it is right).

    Raises:
      InputError: not the same images.
    """
    one, two = dict(first), dict(second)
    if one.keys() != two.keys() or not one:
        raise InputError(
            f"the files have {len(one)} and {len(two)} images, {len(one.keys() & two.keys())} of "
            "them in both: expected the same images"
        )
    only_first = sum(one[image] and not two[image] for image in one)
    only_second = sum(two[image] and not one[image] for image in one)
    return Comparison(
        len(one),
        100 * sum(one.values()) / len(one),
        100 * sum(two.values()) / len(two),
        only_first,
        only_second,
        _binomial(only_first, only_second),
    )


def _binomial(a: int, b: int) -> float:
    count = a + b
    tail = sum(math.comb(count, i) for i in range(min(a, b) + 1))
    return float(min(1.0, 2 * tail / 2**count)) if count else 1.0


def logits_by(model, weights, mean, std, mesh: Mesh, image_size: int, average=()):
    """`step(images)` with a model's own weights on the mesh."""
    step = make_logit_step(as_function(model), mean, std, mesh, image_size, average)
    return functools.partial(step, jax.device_put(weights, replicated(mesh)))
