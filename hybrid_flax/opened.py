"""A trained model with its weights, and what it needs to look at photos; no dataset.

For programs that are given photos: `python -m hybrid_flax.visualize` and `…predict`.
"""

import os
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from hybrid_flax.as_trained import as_trained
from hybrid_flax.build import abstract_model
from hybrid_flax.data.identity import class_names
from hybrid_flax.data.images import UnreadableImageError, eval_crop, open_photo
from hybrid_flax.data.model_input import imagenet_classes, normalise
from hybrid_flax.data.sources.base import IMAGE_SUFFIXES, MOST_BYTES
from hybrid_flax.data.sources.walk import say, walk
from hybrid_flax.errors import InputError
from hybrid_flax.models.backbone import Backbone
from hybrid_flax.models.info import EvalTransform
from hybrid_flax.models.registry import model_info
from hybrid_flax.run.checkpoint_files import check_same
from hybrid_flax.run.saved_weights import load_weights
from hybrid_flax.settings import Tree, replace
from hybrid_flax.text_files import read_bytes, read_lines
from hybrid_flax.weights import bridge
from hybrid_flax.weights.paths import flatten, unflatten_like


class Opened(NamedTuple):
    """A model that can be called, and how photos become its input."""

    model: Backbone
    name: str  # of the architecture
    origin: str  # where the weights are from, for captions
    step: int | None  # of a run
    image_size: int
    transform: EvalTransform
    classes: Sequence[str] | None  # names by number

    @property
    def title(self) -> str:
        return f"{self.name}, {self.origin}"

    def pixels(self, photo: Image.Image) -> np.ndarray:
        """The evaluation crop; uint8 [image_size, image_size, 3]."""
        return eval_crop(photo, self.image_size, self.transform)

    def input(self, pixels: np.ndarray) -> np.ndarray:
        """Normalised float32, of uint8 pixels of any shape [..., 3]."""
        return normalise(pixels, self.transform.mean, self.transform.std)

    def class_name(self, number: int) -> str:
        return self.classes[number] if self.classes else f"class {number}"


def open_model(
    config: Tree | None,
    workdir: str,
    name: str,
    checkpoint: str,
    *,
    given: Collection[str] | None = None,
    class_file: str = "",
    step: int | None = None,
) -> Opened:
    """Opens the weights of a run (or of `python -m convert`), or a released file.

    Args:
      config, given: see `as_trained`; for a work directory.
      workdir: of a run; "" with a name.
      name, checkpoint: of a model, and its released file; "" for one that is downloaded.
      class_file: names of the classes, one a line; "": those of the run, or of ImageNet's 1000.
      step: of a run's checkpoint; None: the newest that is intact.

    Raises:
      InputError: neither or both are given; what is given cannot be used.
    """
    if bool(workdir) == bool(name):
        raise InputError(
            "give a run, --workdir=DIR, or a released model, --model=NAME with --checkpoint=FILE"
            + (": not both" if workdir else "")
        )
    opened = _of_run(config, workdir, given, step) if workdir else _released(name, checkpoint)
    return opened._replace(classes=_class_names(opened, class_file))


def _of_run(
    config: Tree | None, workdir: str, given: Collection[str] | None, step: int | None
) -> Opened:
    saved = load_weights(workdir, step)
    settings = as_trained(config, saved.meta, given)
    names = class_names(saved.meta)
    if not settings.model.num_classes:
        count = saved.meta.get("num_classes") or len(names or ())
        settings = replace(settings, {"model.num_classes": count})
    model = abstract_model(settings)
    template = bridge.get_weights(model)
    check_same(saved.best, flatten(template), f"the checkpoint in {workdir}")
    arrays = {path: jnp.asarray(array) for path, array in saved.best.items()}
    bridge.set_weights(model, unflatten_like(template, arrays))
    evaluation, dataset = settings.eval, settings.dataset
    transform = EvalTransform(
        evaluation.crop_fraction,
        evaluation.crop_mode,
        evaluation.interpolation,
        dataset.mean,
        dataset.std,
    )
    origin = f"{'averaged weights, ' if saved.averaged else ''}step {saved.step} of {workdir}"
    return Opened(
        model,
        settings.model.name,
        origin,
        saved.step,
        settings.model.image_size,
        transform,
        names,
    )


def _released(name: str, checkpoint: str) -> Opened:
    import convert
    from convert.download import download
    from convert.state_dict import model_from_state_dict
    from convert.tensors import check_finite

    info = model_info(name)
    file = os.path.expanduser(checkpoint) if checkpoint else str(download(name, info))
    state = convert.load_checkpoint(file, published=info.weights_entry)
    model, _ = model_from_state_dict(name, state)
    template = bridge.get_weights(model)
    check_finite(flatten(template), file)
    bridge.set_weights(model, jax.tree.map(jnp.asarray, template))
    return Opened(
        model, name, os.path.basename(file), None, _side(model), info.eval_transform, None
    )


def _side(model: Backbone) -> int:
    size: Any = model.image_size
    return size if isinstance(size, int) else max(size)


def _class_names(opened: Opened, file: str) -> Sequence[str] | None:
    count = opened.model.num_classes
    if file:
        names = [line.strip() for _, line in read_lines(os.path.expanduser(file)) if line.strip()]
        if len(names) != count:
            raise InputError(
                f"--class_names={file} has {len(names)} names: expected one a line for each of the "
                f"model's {count} classes, in their order"
            )
        return names
    if opened.classes and len(opened.classes) == count:
        return opened.classes
    return imagenet_classes() if count == 1000 else None


def find_images(given: str) -> list[str]:
    """The files that --images names: folders, with all below them, and files, with commas between.

    Raises InputError for what is not there, or has no images.
    """
    files: list[str] = []
    if not given:
        raise InputError("--images is missing: expected a folder, or files with commas between")
    for part in filter(None, given.split(",")):
        path = os.path.expanduser(part)
        if os.path.isdir(path):
            found = walk(path, IMAGE_SUFFIXES)
            if not found.files:
                raise InputError(
                    f"--images={part} holds no {', '.join(IMAGE_SUFFIXES)} files"
                    + (f"; left out: {say(found.reasons(path))}" if found.left_out else "")
                )
            files += found.files
        elif os.path.exists(path):
            files.append(path)
        else:
            raise InputError(f"--images={part}: there is no such file or folder")
    return list(dict.fromkeys(files))


def read_photo(file: str) -> Image.Image:
    """Opens an image file; UnreadableImageError, naming it, for anything else."""
    try:
        return open_photo(read_bytes(file, MOST_BYTES), file)
    except UnreadableImageError:
        raise
    except InputError as error:
        raise UnreadableImageError(f"cannot read image {error}") from error
