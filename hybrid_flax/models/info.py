"""What is known about a released model before anything is built or downloaded."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """How the published accuracy was measured: see `hybrid_flax.data.eval_crop`."""

    crop_fraction: float
    crop_mode: str  # "center" or "squash"
    interpolation: str
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of RGB in 0..1
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """A released model: what its authors published, and where its weights are."""

    paper: str
    top1: float  # ImageNet-1k validation top-1 in percent, as published
    parameters: int  # of the official model with 1000 classes
    gflops: float  # multiply-adds of one image in 10⁹, as published
    image_size: int  # pixels, height = width
    eval_transform: EvalTransform
    trained_on: str
    release_file: str
    release_page: str
    licence: str
