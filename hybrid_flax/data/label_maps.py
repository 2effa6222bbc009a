"""Label maps of token labelling (arXiv:2104.10858): read beside an image, and moved with it.

One file for each training image, `ROOT/CLASS FOLDER/IMAGE STEM.pt`, as the authors of token
labelling publish them and `hybrid_flax.make_label_maps` writes them: a PyTorch tensor [2, K, H, W]
of float16 with the K highest logits of each cell, and their classes. A map is taken to cover the
whole image, whatever its shape; theirs were made of the middle square.
"""

import dataclasses
import io
import os
import zipfile

import numpy as np

from hybrid_flax.data.augmentation.operations import Operation
from hybrid_flax.errors import InputError
from hybrid_flax.text_files import open_regular

_LARGEST_FILE = 1 << 26  # bytes; a published map has 10,000
_MOST_VALUES = 1 << 22  # of a map


def label_map_file(root: str, image: str) -> str:
    """Finds where an image's map lies, by the image's file name or its name in an archive.

    Raises InputError for a name that would lead out of `root`.
    """
    folder, name = os.path.split(image.replace(":", "/"))
    folder, stem = os.path.basename(folder), name.split(".")[0]
    if folder in (".", "..") or "\0" in folder + stem:
        raise InputError(
            f"image {image!r}: label maps are found by the names of an image and of the folder it "
            f"is in, and {folder + '/' + stem!r} is none. Rename them"
        )
    return os.path.join(root, folder, stem + ".pt")


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
    """float16 [2, K, H, W] of a file, whatever it holds; raises InputError, naming it."""
    if not os.path.lexists(file):
        raise InputError(
            f"image {image} has no label map: there is no file {file}. Maps are found by the name "
            "of an image and of the folder it is in"
        )
    with open_regular(file) as stream:
        try:
            data = stream.read(_LARGEST_FILE + 1)
        except OSError as error:
            raise InputError(f"cannot read label map {file}: {error.strerror}") from error
    if _unpacked_size(data) > _LARGEST_FILE:
        raise InputError(f"label map {file} takes more than {_LARGEST_FILE} bytes: it is none")
    import torch  # only here: most runs read no maps

    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, OSError, EOFError, …
        reason = (str(error).splitlines() or [""])[0][:200]
        if "weights_only" in str(error):  # torch's advice is to run whatever code a file has
            reason = "it holds something else than a tensor, or is damaged"
        raise InputError(
            f"cannot read label map {file}: {reason or type(error).__name__}. Get it, or make it, "
            "again"
        ) from error
    try:
        return _as_array(found, file)
    except (RuntimeError, TypeError, NotImplementedError, MemoryError) as error:
        raise InputError(f"label map {file} cannot be used: {error}"[:400]) from error


def _unpacked_size(data: bytes) -> int:
    """Bytes of a file, or of what it packs as a zip file."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            return max(len(data), sum(member.file_size for member in archive.infolist()))
    except Exception:  # no zip file, or a damaged one: torch says more
        return len(data)


def _as_array(found, file: str) -> np.ndarray:
    """A tensor [2, K, H, W] as float16; InputError for anything else."""
    import torch

    is_tensor = isinstance(found, torch.Tensor)
    kind = type(found).__name__
    if is_tensor:
        kind = "quantised" if found.is_quantized else str(found.layout).removeprefix("torch.")
        kind = f"a {kind} tensor of {str(found.dtype).removeprefix('torch.')} on {found.device}"
        if found.is_quantized or found.layout != torch.strided or found.device.type != "cpu":
            raise InputError(f"label map {file} holds {kind}: expected a dense tensor [2, K, H, W]")
    if not is_tensor or found.is_nested or found.ndim != 4 or len(found) != 2:
        raise InputError(
            f"label map {file} holds {found.shape if is_tensor and not found.is_nested else kind}: "
            "expected a tensor [2, K, H, W] of logits and classes"
        )
    if found.dtype.is_complex or found.dtype == torch.bool:
        raise InputError(f"label map {file} holds {kind}: expected floats or integers")
    if not 0 < found.numel() <= _MOST_VALUES:  # of an expanded tensor few are in the file
        raise InputError(
            f"label map {file} has shape {list(found.shape)}: expected 1 to {_MOST_VALUES} values"
        )
    found = found.detach().to(torch.float64).numpy()
    half = found.astype(np.float16)
    if not np.array_equal(half[1], found[1].round(), equal_nan=True):
        raise InputError(
            f"label map {file} has classes that are no whole numbers, or above 2048, which float16 "
            "does not hold exactly"
        )
    return half


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
