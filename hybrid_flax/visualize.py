"""Pictures of what a model does with images: attention, slots, sampling, CAMs, receptive fields.

python -m hybrid_flax.visualize --workdir=DIR --images=DIR|FILES --out=DIR [--what=attention,cam]
python -m hybrid_flax.visualize --model=gcvit_b --checkpoint=FILE --images=… --out=DIR

The weights are the newest of a run's, or of what `python -m convert` wrote, or a released file's
(without --checkpoint it is downloaded). Writes a PNG for every image, kind and layer, with a
caption that says what it is, and index.html, one page without other files that has them all.
--what: slots, attention, offsets, cam, erf, gram, features; without it, what suits the family.
--steps=all shows the same image through a run: one picture below the other.
"""

import os
import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from tqdm import tqdm

from hybrid_flax import cli
from hybrid_flax.analysis.layers import compiled
from hybrid_flax.data.images import UnreadableImageError
from hybrid_flax.errors import InputError
from hybrid_flax.opened import Opened, find_images, open_model, read_photo
from hybrid_flax.pictures.canvas import stacked
from hybrid_flax.pictures.draw import KINDS, Picture, Subject, default_kinds, draw
from hybrid_flax.pictures.page import embedded, page, table
from hybrid_flax.run import files
from hybrid_flax.run.checkpoints import Checkpoints
from hybrid_flax.text_files import check_local


class Wishes(NamedTuple):
    """What is to be drawn, and where to."""

    images: str
    out: str
    what: tuple[str, ...] = ()  # kinds; (): what suits the family
    layers: tuple[str, ...] | None = None
    place: tuple[float, float] = (0.5, 0.5)
    class_number: int | None = None  # None: the predicted one


def visualize(opened: Sequence[Opened], wishes: Wishes) -> int:
    """Draws every image, of each of the models (the steps of a run), and writes the page.

    Returns:
      How many pictures were written.

    Raises:
      InputError: what is wished for is not there; no image can be read.
    """
    check_local(wishes.out, "--out")
    if not wishes.out:
        raise InputError("--out is missing: expected a folder for the pictures")
    kinds = list(wishes.what) or default_kinds(opened[0].model)
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise InputError(f"--what={','.join(unknown)}: expected some of {', '.join(KINDS)}")
    found = find_images(wishes.images)
    os.makedirs(wishes.out, exist_ok=True)
    names = _names(found)
    sections: dict[str, list[str]] = {}
    count = 0
    for file, name in tqdm(list(zip(found, names, strict=True)), unit="image", disable=None):
        try:
            photo = read_photo(file)
            pixels = opened[0].pixels(photo)
        except UnreadableImageError as error:
            sections[file] = [table([[str(error)]], ["not read"])]
            print(f"warning: {error}")
            continue
        pieces, subjects = [], []
        for each in opened:
            subject, rows = _subject(each, pixels, wishes)
            subjects.append(subject)
            pieces.append(table(rows, ["class", "probability", each.title]))
        for kind in kinds:
            for picture in _through_steps(kind, subjects):
                label = f"{name}_{kind}_{re.sub(r'[^A-Za-z0-9]+', '-', picture.layer)}.png"
                picture.image.save(os.path.join(wishes.out, label), "PNG")
                pieces.append(f"<figure>{embedded(picture.image, label)}</figure>")
                count += 1
        sections[file] = pieces
    if not count:
        raise InputError(f"none of the {len(found)} images can be read: there is nothing to draw")
    text = page(f"{opened[0].name}: {', '.join(kinds)}", _introduction(opened), sections)
    files.replace_text(os.path.join(wishes.out, "index.html"), text)
    return count


def _names(found: Sequence[str]) -> list[str]:
    """A name for each file's pictures: its own, with a number where two are called the same."""
    stems = [os.path.splitext(os.path.basename(file))[0] for file in found]
    return [
        stem if stems.count(stem) == 1 else f"{stem}_{number}" for number, stem in enumerate(stems)
    ]


def _introduction(opened: Sequence[Opened]) -> str:
    sizes = {each.image_size for each in opened}
    return (
        f"{'; '.join(each.title for each in opened)}. Images are the evaluation crops, "
        f"{', '.join(map(str, sizes))} pixels. Scales in brackets are of a panel alone, or of one "
        "image's panels; they do not depend on other images."
    )


def _logits(model, images):
    return model(images)


def _subject(opened: Opened, pixels: np.ndarray, wishes: Wishes) -> tuple[Subject, list[list[str]]]:
    """(what is drawn, the five best classes for the page)."""
    image = jnp.asarray(opened.input(pixels)[None])
    number, rows = 0, []
    if opened.model.num_classes:
        logits = np.asarray(compiled(_logits, opened.model, [image]), np.float64)[0]
        if not np.isfinite(logits).all():
            raise InputError(f"{opened.title}: the logits are NaN or infinite, so no class is best")
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        best = np.argsort(-shares)[:5]
        rows = [[opened.class_name(int(i)), f"{shares[i]:.3f}", ""] for i in best]
        number = int(best[0]) if wishes.class_number is None else wishes.class_number
        if not 0 <= number < len(shares):
            raise InputError(f"--class={number}: expected 0 to {len(shares) - 1}")
    subject = Subject(
        opened.model,
        opened.title,
        image,
        pixels,
        wishes.place,
        wishes.layers,
        number,
        opened.class_name(number) if opened.model.num_classes else "",
    )
    return subject, rows


def _through_steps(kind: str, subjects: Sequence[Subject]) -> list[Picture]:
    of_steps = [draw(kind, subject) for subject in subjects]
    return [
        same[-1]._replace(image=stacked([each.image for each in same]))
        if len(same) > 1
        else same[0]
        for same in zip(*of_steps, strict=True)
    ]


def _steps(workdir: str, given: str) -> list[int | None]:
    if not given:
        return [None]
    there = Checkpoints(os.path.join(workdir, "checkpoints")).steps() if workdir else []
    if given == "all":
        if not there:
            raise InputError("--steps=all needs a run with checkpoints: --workdir=DIR")
        return list(there)
    try:
        return [int(step) for step in given.split(",")]
    except ValueError as error:
        raise InputError(f"--steps={given}: expected all, or steps with commas between") from error


def parse_place(text: str) -> tuple[float, float]:
    """ "0.5,0.5" as fractions of height and width; InputError for anything else."""
    try:
        row, column = map(float, text.split(","))
    except ValueError:
        row = column = -1.0
    if not (0 <= row <= 1 and 0 <= column <= 1):
        raise InputError(
            f"--place={text}: expected two fractions of the image, down and right, such as 0.5,0.5"
        )
    return row, column


def listed(text: str) -> tuple[str, ...]:
    """Names with commas between."""
    return tuple(part for part in text.split(",") if part)


def main(
    config: ml_collections.ConfigDict | None,
    workdir: str,
    options: dict[str, str],
    given: Collection[str] | None = None,
) -> int:
    """Opens the model, or a run's steps, draws, and says where the pictures are.

    Args:
      config, given: see `as_trained`.
      options: the values of the flags, as text.
    """
    wishes = Wishes(
        options["images"],
        options["out"],
        listed(options["what"]),
        listed(options["layer"]) or None,
        parse_place(options["place"]),
        _class_number(options["class"]),
    )
    opened = [
        open_model(
            config,
            workdir,
            options["model"],
            options["checkpoint"],
            given=given,
            class_file=options["class_names"],
            step=step,
        )
        for step in _steps(workdir, options["steps"])
    ]
    count = visualize(opened, wishes)
    print(f"{count} pictures and index.html are in {options['out']}")
    return 0


def _class_number(text: str) -> int | None:
    if not text:
        return None
    if not text.isdigit():
        raise InputError(f"--class={text}: expected the number of a class")
    return int(text)


def define_model_flags() -> None:
    """The flags of programs that open a model for photos."""
    flags.DEFINE_string("model", "", "A released model, in place of --workdir.")
    flags.DEFINE_string("checkpoint", "", "Its file; without it, it is downloaded.")
    flags.DEFINE_string("images", "", "A folder, or files with commas between.")
    flags.DEFINE_string("class_names", "", "A file with the name of each class, one a line.")


def flag_values(*names: str) -> dict[str, str]:
    return {name: flags.FLAGS[name].value for name in names}


if __name__ == "__main__":
    define_model_flags()
    flags.DEFINE_string("out", "", "Folder for the pictures.")
    flags.DEFINE_string("what", "", f"Some of {', '.join(KINDS)}; default: by family.")
    flags.DEFINE_string("layer", "", "Layers by name, or stages (stages/2); default: by kind.")
    flags.DEFINE_string("place", "0.5,0.5", "Of the query: fractions down and right.")
    flags.DEFINE_string("class", "", "Number of the class that CAMs explain; default: predicted.")
    flags.DEFINE_string("steps", "", "Of a run: all, or steps with commas between.")
    cli.run(
        lambda config, workdir: main(
            config,
            workdir,
            flag_values(
                *("model", "checkpoint", "images", "class_names"),
                *("out", "what", "layer", "place", "class", "steps"),
            ),
            cli.given_fields(),
        ),
        needs_config=False,
        needs_workdir=False,
    )
