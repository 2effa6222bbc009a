"""Label maps of token labelling (arXiv:2104.10858): read beside an image, and moved with it.

One file for each training image, `ROOT/CLASS FOLDER/IMAGE STEM.pt`, as the authors of token
labelling publish them and `hybrid_flax.make_label_maps` writes them: a PyTorch tensor [2, K, H, W]
of float16 with the K highest logits of each cell, and their classes. A map is taken to cover the
whole image, whatever its shape; theirs were made of the middle square.
"""

import dataclasses
import os

import numpy as np

from hybrid_flax.data.augmentation.operations import Operation
from hybrid_flax.errors import InputError


def label_map_file(root: str, image: str) -> str:
    """Finds where an image's map lies, by the image's file name or its name in an archive."""
    folder, stem = os.path.split(image.replace(":", "/"))
    return os.path.join(root, os.path.basename(folder), stem.split(".")[0] + ".pt")


@dataclasses.dataclass(frozen=True)
class LabelMaps:
    """The maps under a folder, which all have one shape [2, K, H, W]."""

    root: str
    num_classes: int
    shape: tuple[int, ...]

    @classmethod
    def open(cls, root: str, num_classes: int, image: str) -> "LabelMaps":
        """The maps of the shape that this image's has. Raises as `read`."""
        if not os.path.isdir(root):
            raise InputError(
                f"--config.dataset.label_maps={root}: there is no such folder. Unpack the "
                "published maps there, or make some: python -m hybrid_flax.make_label_maps"
            )
        return cls(root, num_classes, _load(label_map_file(root, image), image).shape)

    def read(self, image: str) -> np.ndarray:
        """float16 [2, K, H, W] of an image.

        Raises:
          InputError: no file, not a label map, one of another shape, or classes beyond the last.
        """
        file = label_map_file(self.root, image)
        found = _load(file, image)
        if found.shape != self.shape:
            raise InputError(
                f"label map {file} has shape {list(found.shape)}, the first one "
                f"{list(self.shape)}: all must be equal. Make them with one model and image size"
            )
        if not np.isfinite(found[0]).all():
            raise InputError(f"label map {file} has logits that are not finite. Make it again")
        classes = found[1]
        if not ((classes >= 0) & (classes < self.num_classes)).all():
            raise InputError(
                f"label map {file} has classes from {classes.min():.0f} to {classes.max():.0f}: "
                f"expected 0 to {self.num_classes - 1}, the dataset's"
            )
        return found


def _load(file: str, image: str) -> np.ndarray:
    import torch  # only here: most runs read no maps

    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(
            f"image {image} has no label map: there is no file {file}. Maps are found by the name "
            "of an image and of the folder it is in"
        ) from None
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, OSError, EOFError, …
        raise InputError(f"cannot read label map {file}: {error}") from error
    if not isinstance(found, torch.Tensor) or found.ndim != 4 or len(found) != 2:
        raise InputError(
            f"label map {file} holds {getattr(found, 'shape', type(found).__name__)}: expected a "
            "tensor [2, K, H, W] of logits and classes"
        )
    return found.to(torch.float16).numpy()


def move(label_map: np.ndarray, operation: Operation, photo_size: tuple[int, int]) -> np.ndarray:
    """The map [2, K, H, W] of an image after an operation: each cell takes the nearest one.

    Cells from outside of the image get logits of 0, and the classes of the nearest cell.

    Args:
      photo_size: width and height of the image in pixels.
    """
    if not operation.is_geometric:
        return label_map
    size = np.array(photo_size, np.float64)
    matrix, offset = operation.source_of_pixels(photo_size)
    cells = np.array(label_map.shape[:1:-1])  # across, down
    at = np.stack(np.meshgrid(*((np.arange(count) + 0.5) for count in cells)), axis=-1)
    at = (at / cells * size) @ matrix.T + offset  # pixels of the image before
    at = np.floor(at / size * cells).astype(np.int64)
    inside = ((at >= 0) & (at < cells)).all(-1)
    column, row = np.moveaxis(np.clip(at, 0, cells - 1), -1, 0)
    moved = label_map[:, :, row, column]
    moved[0] *= inside
    return moved
