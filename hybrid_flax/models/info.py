"""Facts about a released model, known before anything is built or downloaded."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """The way the published accuracy was measured: see `hybrid_flax.data.eval_crop`."""

    crop_fraction: float
    crop_mode: str  # "center" or "squash"
    interpolation: str
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of RGB in 0..1
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """A model: what its authors published, and where its weights are."""

    paper: str
    top1: float | None  # ImageNet-1k validation top-1 in percent, where published
    parameters: int  # of the official model with 1000 classes
    gflops: float | None  # multiply-adds of one image in 10⁹, where published
    image_size: int  # pixels, height = width
    eval_transform: EvalTransform
    trained_on: str
    release_file: str  # "" where the authors released no weights
    release_page: str  # for people
    licence: str
    download_url: str = ""  # direct link to release_file, where the authors publish one
    sha256: str = ""  # of the release file, where published
    weights_entry: str | None = None  # of the file; None: as `load_checkpoint` finds it
