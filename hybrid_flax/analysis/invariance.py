"""How far predictions stay when the image is moved, turned or scaled (arXiv:2211.05781).

The views and the numbers are those of the study's own program, to the pixel; what we do otherwise
when not asked for them says `as_published`.
"""

import functools
import math
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from hybrid_flax.data.images import FILTERS, rgb
from hybrid_flax.errors import InputError

KINDS = ("standard", "translate", "rotate_before", "rotate_after", "scale")
FRACTION = 0.875  # of the standard view
# Which way the crop moves, (down, right). The study's program never draws the last.
DIRECTIONS = ((1, 0), (0, 1), (-1, 0), (0, -1), (1, 1), (-1, 1), (-1, -1), (1, -1))
DIRECTION_NAMES = (
    *("down", "right", "up", "left"),
    *("down right", "up right", "up left", "down left"),
)
GRID: Mapping[str, tuple[float, ...]] = {  # the study's strengths
    "translate": tuple(range(0, 65, 4)),  # pixels
    "rotate_before": tuple(range(0, 91, 5)),  # degrees, counter-clockwise
    "rotate_after": tuple(range(0, 91, 5)),
    "scale": tuple(round(0.2 + 0.125 * step, 3) for step in range(15)),  # crop fractions
}


def transformed(
    photo: Image.Image,
    kind: str,
    strength: float = 0,
    *,
    direction: int = 0,
    image_size: int = 224,
    interpolation: str = "bicubic",
    fraction: float = FRACTION,
    as_published: bool = True,
) -> np.ndarray:
    """One view of a photo; uint8 [image_size, image_size, 3].

    - standard: the evaluation crop: the shorter side to ⌊image_size / 0.875⌋, the middle.
    - translate: the crop moved by so many pixels. It is cut off at the image's border, and what is
      left stands in the middle of black: of 224 pixels a strength above 16 shows the content moved
      by 16 + (strength - 16) / 2.
    - rotate_before: the resized image turned by so many degrees, counter-clockwise, on its own
      canvas, with black corners; then the middle.
    - rotate_after: the standard view turned.
    - scale: the standard view with the strength as its crop fraction. Beyond 1 there is black
      around the image.

    Args:
      photo: a Pillow image.
      direction: where the crop of "translate" moves: 0 down, 1 right, 2 up, 3 left, 4 down right,
        5 up right, 6 up left, 7 down left.
      image_size: height and width in pixels.
      interpolation: of resizing; rotations are bicubic.
      fraction: of the standard view's side in the resized image's, the study's 0.875.
      as_published: with strength 0 the study moves the crop by one pixel where a side of the
        resized image is 3 above a multiple of 4; False: it is the standard view.

    Raises:
      InputError: an unknown kind, or a strength, direction or size that cannot be.
    """
    _check(photo, kind, strength, direction, image_size)
    photo = rgb(photo)
    if kind == "scale":
        return _centre(_resized(photo, image_size, strength, interpolation), image_size)
    resized = _resized(photo, image_size, fraction, interpolation)
    if kind == "translate":
        down, right = DIRECTIONS[direction]
        return _moved(resized, image_size, strength * down, strength * right, as_published)
    if kind == "rotate_before":
        return _centre(_turned(resized, strength), image_size)
    view = _centre(resized, image_size)
    if kind == "rotate_after":
        return np.asarray(_turned(Image.fromarray(view), strength))
    return view


def _check(photo, kind: str, strength: float, direction: int, image_size: int) -> None:
    if not isinstance(photo, Image.Image):
        raise InputError(
            f"the photo is a {type(photo).__name__}; expected a Pillow image: PIL.Image.open(FILE)"
        )
    if kind not in KINDS:
        raise InputError(f"kind={kind!r}: expected one of {', '.join(KINDS)}")
    if not isinstance(image_size, int) or image_size < 1:
        raise InputError(f"image_size={image_size!r}: expected a number of pixels, at least 1")
    if direction not in range(len(DIRECTIONS)):
        raise InputError(f"direction={direction!r}: expected 0 to {len(DIRECTIONS) - 1}")
    expected = {
        "translate": (
            float(strength).is_integer() and 0 <= strength < image_size,
            f"a whole number of pixels from 0 to below {image_size}",
        ),
        "scale": (0.01 <= strength <= 100, "a crop fraction from 0.01 to 100"),
    }
    fits, words = expected.get(kind, (math.isfinite(strength), "a finite number of degrees"))
    if not fits:
        raise InputError(f"strength={strength!r} of {kind}: expected {words}")


def _resized(
    photo: Image.Image, image_size: int, fraction: float, interpolation: str
) -> Image.Image:
    if interpolation not in FILTERS:
        raise InputError(f"interpolation={interpolation!r}: expected one of {', '.join(FILTERS)}")
    shorter = int(image_size / fraction)
    if shorter < 1:
        raise InputError(
            f"strength={fraction} of scale: nothing is left of an image_size of {image_size}"
        )
    width, height = photo.size
    size = (
        (shorter, int(shorter * height / width))
        if width <= height
        else (int(shorter * width / height), shorter)
    )
    return photo if size == photo.size else photo.resize(size, FILTERS[interpolation])


def _centre(photo: Image.Image, size: int) -> np.ndarray:
    """The middle; what is missing is black, an odd pixel of it at the right or the bottom."""
    return _padded(np.asarray(photo), size, cut=True)


def _padded(pixels: np.ndarray, size: int, *, cut: bool) -> np.ndarray:
    missing = [max(size - side, 0) for side in pixels.shape[:2]]
    pixels = np.pad(pixels, [*((each // 2, each - each // 2) for each in missing), (0, 0)])
    if not cut:
        return pixels
    top, left = (round((side - size) / 2) for side in pixels.shape[:2])  # half to even
    return pixels[top : top + size, left : left + size]


def _moved(
    photo: Image.Image, size: int, down: float, right: float, as_published: bool
) -> np.ndarray:
    pixels = np.asarray(photo)
    starts = [
        (side // 2 - size // 2 if as_published else round((side - size) / 2)) + int(by)
        for side, by in zip(pixels.shape[:2], (down, right), strict=True)
    ]
    rows, columns = (
        slice(max(start, 0), min(start + size, side))
        for start, side in zip(starts, pixels.shape[:2], strict=True)
    )
    return _padded(pixels[rows, columns], size, cut=False)


def _turned(photo: Image.Image, degrees: float) -> Image.Image:
    return photo.rotate(degrees, Image.Resampling.BICUBIC)


def published_direction(seed: int, image: int, strength: float) -> int:
    """The direction that the study's program draws with a single worker after seeding NumPy.

    It draws image by image, in it strength by strength, and never the last direction.

    Raises InputError for a strength that is none of its own.
    """
    strengths = GRID["translate"]
    if strength not in strengths:
        raise InputError(f"strength={strength}: the study has {', '.join(map(str, strengths))}")
    return int(_published_draws(seed, image // _CHUNK)[image % _CHUNK, strengths.index(strength)])


_CHUNK = 1024  # images whose draws are kept together


@functools.lru_cache(maxsize=4)
def _published_draws(seed: int, chunk: int) -> np.ndarray:
    shape = ((chunk + 1) * _CHUNK, len(GRID["translate"]))
    return np.random.RandomState(seed).randint(7, size=shape)[chunk * _CHUNK :]


def drawn_direction(seed: int, image: int, strength: float) -> int:
    """The direction in which an image's crop moves, 0 to 7: it follows from these numbers alone."""
    sequence = np.random.SeedSequence([seed, image, round(1000 * strength)])
    return int(np.random.default_rng(sequence).integers(len(DIRECTIONS)))


# ------------------------------------------------------------------------------------- numbers


def per_image(
    view_logits: Float[np.ndarray, "N K"],
    standard_logits: Float[np.ndarray, "N K"],
    labels: Int[np.ndarray, "N"],
) -> dict[str, Float[np.ndarray, "N"]]:
    """The numbers of `scores` for every image, float64; percents are 0 or 100.

    Raises InputError for shapes that do not fit each other, or no image.
    """
    view, standard = (np.asarray(x, np.float64) for x in (view_logits, standard_logits))
    labels = np.asarray(labels)
    if view.ndim != 2 or view.shape != standard.shape or labels.shape != view.shape[:1]:
        raise InputError(
            f"logits of shapes {view.shape} and {standard.shape}, labels {labels.shape}: expected "
            "[N, classes] twice, and [N]"
        )
    if not len(view):
        raise InputError("there is no image to score")
    log_view, log_standard = _log_softmax(view), _log_softmax(standard)
    share = np.exp(log_standard)
    loss = -(share * log_view).sum(-1)
    entropy = -(share * log_standard).sum(-1)
    first = view.argmax(-1)
    best = np.argsort(-view, axis=-1, kind="stable")[:, :5]
    return {
        "loss": loss,
        "divergence": loss - entropy,
        "consistency": 100.0 * (first == standard.argmax(-1)),
        "top1": 100.0 * (first == labels),
        "top5": 100.0 * (best == labels[:, None]).any(-1),
    }


def scores(
    view_logits: Float[np.ndarray, "N K"],
    standard_logits: Float[np.ndarray, "N K"],
    labels: Int[np.ndarray, "N"],
) -> dict[str, float]:
    """How a view's predictions differ from the standard view's: means over the images.

    Returns:
      - "loss": cross entropy of the view's prediction against the standard one's, in nats: the
        study's. It is no divergence: for equal views it is the entropy of the prediction.
      - "divergence": the same less that entropy, Kullback-Leibler: 0 for equal views.
      - "consistency": percent of images with the same first class in both.
      - "top1", "top5": percent of the view's against the labels.

    Raises:
      InputError: shapes that do not fit each other, or no image.
    """
    found = per_image(view_logits, standard_logits, labels)
    return {name: float(values.mean()) for name, values in found.items()}


def standard_error(values: Float[np.ndarray, "N"]) -> float:
    """Of the mean over images; NaN for a single one."""
    count = len(values)
    return float(np.std(values, ddof=1) / math.sqrt(count)) if count > 1 else math.nan


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
