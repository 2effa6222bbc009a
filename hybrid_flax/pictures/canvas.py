"""Maps as colours over an image, panels side by side, captions below. Pillow and colour tables."""

import functools
import os
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

TILE = 224  # pixels of a panel's shorter side, at least
_GAP, _LINE, _FONT = 8, 15, 11
Pixels = UInt8[np.ndarray, "H W 3"]


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    import matplotlib

    # Pillow's own has no ×.
    file = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
    return ImageFont.truetype(file, _FONT)


class Panel(NamedTuple):
    """An image and the line below it."""

    pixels: Pixels
    label: str


@functools.cache
def _colours(name: str) -> UInt8[np.ndarray, "256 3"]:
    import matplotlib

    table = matplotlib.colormaps[name](np.linspace(0, 1, 256))
    return np.rint(255 * table[:, :3]).astype(np.uint8)


def heat(
    values: Float[np.ndarray, "h w"],
    pixels: Pixels | None,
    label: str,
    *,
    signed: bool = False,
    smooth: bool = False,
    limits: tuple[float, float] | None = None,
) -> Panel:
    """A map as colours, over the image in grey where there is one; its scale stands in the label.

    Args:
      values: places are squares, or blended into each other if `smooth`.
      label: what it is.
      signed: blue below 0, red above, white for 0; otherwise from dark to yellow.
      limits: what gets the first and the last colour; default: 0 (or the smallest, if that is
        below), and the largest of this map alone.
    """
    largest = float(np.abs(values).max() if signed else values.max())
    low, high = limits or (
        (-largest, largest) if signed else (min(float(values.min()), 0), largest)
    )
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    size = _size(pixels if pixels is not None else values)
    numbers = Image.fromarray(np.rint(255 * np.clip(scaled, 0, 1)).astype(np.uint8))
    kind = Image.Resampling.BILINEAR if smooth else Image.Resampling.NEAREST
    shown = _colours("RdBu_r" if signed else "viridis")[np.asarray(numbers.resize(size, kind))]
    if pixels is not None:
        grey = Image.fromarray(pixels).convert("L").resize(size, Image.Resampling.BICUBIC)
        shown = 0.62 * shown + 0.38 * np.asarray(grey)[..., None]
    return Panel(np.rint(shown).astype(np.uint8), f"{label} [{_number(low)}, {_number(high)}]")


def _number(value: float) -> str:
    return f"{value:.3g}"


def _size(array: np.ndarray) -> tuple[int, int]:
    """(width, height) of the panel for a map or an image."""
    height, width = array.shape[:2]
    factor = max(1, TILE / min(height, width))
    return round(width * factor), round(height * factor)


def picture_panel(pixels: Pixels, label: str) -> Panel:
    """The image itself, enlarged to a panel's size if it is smaller."""
    image = Image.fromarray(pixels).resize(_size(pixels), Image.Resampling.BICUBIC)
    return Panel(np.asarray(image), label)


def colour_classes(numbers: np.ndarray, pixels: Pixels, label: str, count: int) -> Panel:
    """A map of whole numbers, each with a colour of its own, over the image."""
    hues = (np.arange(count) * 0.618034) % 1.0  # far apart for neighbours
    colours = [Image.new("HSV", (1, 1), (int(255 * hue), 200, 235)).convert("RGB") for hue in hues]
    table = np.stack([np.asarray(colour)[0, 0] for colour in colours])
    size = _size(pixels)
    large = Image.fromarray(numbers.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    grey = Image.fromarray(pixels).convert("L").resize(size, Image.Resampling.BICUBIC)
    shown = 0.55 * table[np.asarray(large)] + 0.45 * np.asarray(grey)[..., None]
    return Panel(np.rint(shown).astype(np.uint8), label)


def marked(panel: Panel, places: Sequence[tuple[float, float, float, str]], shape: tuple) -> Panel:
    """Dots on a panel: (x, y) in pixels of the image of that shape, radius, colour."""
    image = Image.fromarray(panel.pixels)
    draw = ImageDraw.Draw(image)
    across, down = image.width / shape[1], image.height / shape[0]
    for x, y, radius, colour in places:
        cx, cy = (x + 0.5) * across, (y + 0.5) * down
        draw.ellipse(
            (cx - radius, cy - radius, cx + radius, cy + radius), fill=colour, outline="black"
        )
    return panel._replace(pixels=np.asarray(image))


def principal(found: Float[np.ndarray, "h w C"], pixels: Pixels) -> Pixels:
    """The first three principal components over the places as red, green and blue."""
    height, width, channels = found.shape
    vectors = found.reshape(-1, channels).astype(np.float64)
    vectors -= vectors.mean(0)
    _, _, axes = np.linalg.svd(vectors, full_matrices=False)
    parts = np.zeros((height * width, 3))
    for number, axis in enumerate(axes[:3]):
        axis = axis * np.sign(axis[np.abs(axis).argmax()])  # the SVD leaves the sign open
        values = vectors @ axis
        low, high = np.percentile(values, (1, 99))
        parts[:, number] = np.clip((values - low) / (high - low if high > low else 1), 0, 1)
    image = Image.fromarray(np.rint(255 * parts).astype(np.uint8).reshape(height, width, 3))
    return np.asarray(image.resize(_size(pixels), Image.Resampling.NEAREST))


def mosaic(maps: np.ndarray) -> np.ndarray:
    """Maps in a square, one place apart."""
    side = int(np.ceil(np.sqrt(len(maps))))
    height, width = maps.shape[1:]
    canvas = np.zeros((side * (height + 1) - 1, side * (width + 1) - 1), np.float32)
    for number, one in enumerate(maps):
        top, left = number // side * (height + 1), number % side * (width + 1)
        canvas[top : top + height, left : left + width] = one
    return canvas


def figure(panels: Sequence[Panel], caption: str, columns: int = 6) -> Image.Image:
    """Panels row by row, each with its label, and the caption below."""
    font = _font()
    width = max(panel.pixels.shape[1] for panel in panels)
    height = max(panel.pixels.shape[0] for panel in panels)
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    labels = [textwrap.wrap(panel.label, max(width // 7, 12)) or [""] for panel in panels]
    lines = max(map(len, labels))
    total = columns * (width + _GAP) + _GAP
    text = textwrap.wrap(caption, max(total // 7, 24))
    tile = height + lines * _LINE + _GAP
    canvas = Image.new("RGB", (total, rows * tile + _GAP + _LINE * len(text) + _GAP), "white")
    draw = ImageDraw.Draw(canvas)
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        left, top = _GAP + column * (width + _GAP), _GAP + row * tile
        canvas.paste(Image.fromarray(panel.pixels), (left, top))
        for i, line in enumerate(labels[number]):
            draw.text((left, top + height + 2 + i * _LINE), line, "black", font)
    for i, line in enumerate(text):
        draw.text((_GAP, rows * tile + _GAP + i * _LINE), line, "black", font)
    return canvas


def stacked(images: Sequence[Image.Image]) -> Image.Image:
    """Images below each other: the same picture at several steps of a run."""
    canvas = Image.new(
        "RGB", (max(each.width for each in images), sum(each.height for each in images)), "white"
    )
    top = 0
    for image in images:
        canvas.paste(image, (0, top))
        top += image.height
    return canvas
