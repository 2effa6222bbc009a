"""Predictions for images that nobody labelled: the five best classes of each, as CSV.

python -m hybrid_flax.predict --workdir=DIR --images=DIR|FILES --out=predictions.csv [--html]
python -m hybrid_flax.predict --model=gcvit_b --checkpoint=FILE --images=… --out=predictions.csv

The weights are the newest of a run's, or of what `python -m convert` wrote, or a released file's.
Every image has a row; one that cannot be read says why in its last column. Names of classes are
those of the run, ImageNet's for a released model, or those of --class_names=FILE. --html writes a
page beside the CSV; --features=FILE the pooled features, .npy (in the order of the rows that were
read) or .parquet (with the names).
"""

import csv
import io
import os
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from jaxtyping import Array, Float
from PIL import Image
from tqdm import tqdm

from hybrid_flax import cli
from hybrid_flax.analysis.layers import compiled
from hybrid_flax.data.images import UnreadableImageError
from hybrid_flax.errors import InputError
from hybrid_flax.models.backbone import Backbone
from hybrid_flax.opened import Opened, find_images, open_model, read_photo
from hybrid_flax.pictures.page import embedded, page, table
from hybrid_flax.run import files
from hybrid_flax.text_files import check_local
from hybrid_flax.visualize import define_model_flags, flag_values

BEST = 5
_THUMBNAIL = 160  # pixels, on the page


class Prediction(NamedTuple):
    """What a model says of an image."""

    file: str
    error: str  # why it could not be read or predicted; "": it could
    classes: Sequence[int] = ()  # the best first
    probabilities: Sequence[float] = ()
    features: Float[np.ndarray, "C"] | None = None


def _forward(model: Backbone, images: Array) -> tuple[Array, Array]:
    maps = model.intermediates(images)
    pooled = [value for name, value in maps.items() if name.startswith("pooled")]
    logits = maps["logits"].astype(jnp.float32)
    return jax.nn.softmax(logits, axis=-1), jnp.concatenate(pooled, axis=-1).astype(jnp.float32)


def predictions(opened: Opened, found: Sequence[str], batch_size: int = 32) -> Iterator[Prediction]:
    """Predicts every file, in order.

    Args:
      batch_size: of images that go through the model together.

    Raises:
      InputError: the model has no classifier.
    """
    if not opened.model.num_classes:
        raise InputError(f"{opened.title} has no classifier: there is nothing to predict")
    for begin in range(0, len(found), batch_size):
        part = found[begin : begin + batch_size]
        pixels, errors = [], {}
        for file in part:
            try:
                pixels.append(opened.pixels(read_photo(file)))
            except UnreadableImageError as error:
                errors[file] = str(error)
        if pixels:
            rows = np.zeros((min(batch_size, len(found)), *pixels[0].shape), np.uint8)
            rows[: len(pixels)] = pixels  # one shape for all batches: it is compiled once
            shares, features = map(
                np.asarray, compiled(_forward, opened.model, [opened.input(rows)])
            )
        read = iter(range(len(pixels)))
        for file in part:
            if file in errors:
                yield Prediction(file, errors[file])
                continue
            row = next(read)
            if not np.isfinite(shares[row]).all():
                yield Prediction(file, f"{file}: its logits are NaN or infinite")
                continue
            best = np.argsort(-shares[row], kind="stable")[:BEST]
            yield Prediction(file, "", best.tolist(), shares[row][best].tolist(), features[row])


def as_csv(opened: Opened, rows: Sequence[Prediction]) -> str:
    """One line an image: file, then number, name and probability of each class, then the error."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    count = min(BEST, opened.model.num_classes)
    numbers = range(1, count + 1)
    head = [f"{what}{i}" for i in numbers for what in ("class", "name", "probability")]
    writer.writerow(["image", *head, "error"])
    for row in rows:
        cells: list[object] = []
        for number, share in zip(row.classes, row.probabilities, strict=True):
            cells += [number, opened.class_name(number), f"{share:.6f}"]
        writer.writerow([row.file, *(cells or [""] * len(head)), row.error])
    return stream.getvalue()


def as_page(opened: Opened, rows: Sequence[Prediction]) -> str:
    """A page with a thumbnail and the best classes of every image."""
    sections: dict[str, list[str]] = {}
    for row in rows:
        if row.error:
            sections[row.file] = [table([[row.error]], ["not predicted"])]
            continue
        thumbnail = Image.fromarray(opened.pixels(read_photo(row.file)))
        thumbnail.thumbnail((_THUMBNAIL, _THUMBNAIL))
        best = zip(row.classes, row.probabilities, strict=True)
        cells = [[opened.class_name(number), f"{100 * share:.1f} %"] for number, share in best]
        sections[row.file] = [embedded(thumbnail, row.file), table(cells, ["class", "probability"])]
    words = (
        f"{len(rows)} images, evaluation crops of {opened.image_size} pixels, as the model sees."
    )
    return page(f"Predictions of {opened.title}", words, sections)


def write_features(file: str, rows: Sequence[Prediction]) -> None:
    """Writes pooled features, [images, C] float32; InputError for another ending than these two."""
    read = [row for row in rows if row.features is not None]
    array = np.stack([row.features for row in read]) if read else np.zeros((0, 0), np.float32)
    stream = io.BytesIO()
    if file.endswith(".npy"):
        np.save(stream, array)
    else:
        import pyarrow
        from pyarrow import parquet

        names = [os.fsencode(row.file).decode(errors="backslashreplace") for row in read]
        columns = {"image": names, "features": list(array)}
        parquet.write_table(pyarrow.table(columns), stream)
    files.replace(file, stream.getvalue())


def _check_outputs(out: str, features: str) -> None:
    if not out:
        raise InputError("--out is missing: expected a file for the table, such as predictions.csv")
    if features and not features.endswith((".npy", ".parquet")):
        raise InputError(f"--features={features}: expected a file that ends in .npy or .parquet")
    for flag, file in (("--out", out), ("--features", features)):
        check_local(file, flag)
        folder = os.path.dirname(file) or "."
        if file and not os.path.isdir(folder):
            raise InputError(f"{flag}={file}: there is no folder {folder}")
        if os.path.isdir(file):
            raise InputError(f"{flag}={file} is a folder; expected a file")


def main(
    config: ml_collections.ConfigDict | None,
    workdir: str,
    options: dict[str, str],
    *,
    html: bool = False,
    batch_size: int = 32,
    given: Collection[str] | None = None,
) -> int:
    """Predicts all images and writes the files.

    Args:
      config, given: see `as_trained`.
      options: the values of the flags, as text.
      html: whether a page is written, beside the table.
    """
    out, features = (os.path.expanduser(options[name]) for name in ("out", "features"))
    _check_outputs(out, features)
    if batch_size < 1:
        raise InputError(f"--batch_size={batch_size}: expected 1 or more")
    found = find_images(options["images"])
    opened = open_model(
        config,
        workdir,
        options["model"],
        options["checkpoint"],
        given=given,
        class_file=options["class_names"],
    )
    bar = tqdm(predictions(opened, found, batch_size), total=len(found), unit="image", disable=None)
    rows = list(bar)
    unread = [row for row in rows if row.error]
    for row in unread:
        print(f"warning: {row.error}")
    if len(unread) == len(rows):
        raise InputError(
            f"none of the {len(rows)} images can be predicted. The first: {unread[0].error}"
        )
    files.replace_text(out, as_csv(opened, rows))
    if html:
        files.replace_text(f"{os.path.splitext(out)[0]}.html", as_page(opened, rows))
    if features:
        write_features(features, rows)
    print(f"{len(rows) - len(unread)} of {len(rows)} images predicted by {opened.title}: {out}")
    return 0


if __name__ == "__main__":
    define_model_flags()
    flags.DEFINE_string("out", "", "File for the table, such as predictions.csv.")
    flags.DEFINE_string("features", "", "File for the pooled features: .npy or .parquet.")
    _html = flags.DEFINE_boolean("html", False, "Write a page, too.")
    _batch_size = flags.DEFINE_integer("batch_size", 32, "Images at a time.")
    cli.run(
        lambda config, workdir: main(
            config,
            workdir,
            flag_values("model", "checkpoint", "images", "class_names", "out", "features"),
            html=_html.value,
            batch_size=_batch_size.value,
            given=cli.given_fields(),
        ),
        needs_config=False,
        needs_workdir=False,
    )
