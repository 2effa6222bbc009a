"""Label maps for token labelling, from any model of ours that classifies places.

python -m hybrid_flax.make_label_maps --config=configs/gcvit_b.py --workdir=DIR --out=MAPS

DIR holds the annotating model: the work directory of a training run, or what `python -m convert`
wrote. Every training image of the config's dataset is cut as for evaluation
(`--config.eval.crop_fraction=1.0 --config.eval.crop_mode=squash`: all of it is seen), and the five
highest logits of each place of the last map are written in the format that
`--config.dataset.label_maps=MAPS` reads. Images that have a map are left out, so that the same
command continues after an interruption.
"""

import contextlib
import os
from collections.abc import Collection

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from jax.sharding import Mesh
from tqdm import tqdm

from hybrid_flax import cli
from hybrid_flax.data.label_maps import label_map_file
from hybrid_flax.data.loader import eval_batches
from hybrid_flax.data.sources import Subset
from hybrid_flax.data.transforms import EvalTransform
from hybrid_flax.distributed.batch import batch_sharded, round_up, to_devices
from hybrid_flax.distributed.mesh import on_mesh, replicated
from hybrid_flax.errors import InputError
from hybrid_flax.run.compiling import CompiledOnce
from hybrid_flax.scan_choice import scans
from hybrid_flax.settings import Dataset
from hybrid_flax.start import open_trained
from hybrid_flax.text_files import check_local
from hybrid_flax.training.batch_augmentation import normalise
from hybrid_flax.weights.functions import as_function

HIGHEST = 5


def main(
    config: ml_collections.ConfigDict | None,
    workdir: str,
    out: str,
    given: Collection[str] | None = None,
) -> int:
    """Writes a map for every training image that has none; `config`, `given`: see `as_trained`."""
    found = open_trained(config, workdir, "train", given)
    weights, (settings, source, mesh, model) = found.best, found.prepared
    if settings.model.num_classes > 2048:
        raise InputError(
            f"{settings.model.num_classes} classes: label maps hold them as float16, which is "
            "exact up to 2048. Annotate with a model of fewer"
        )
    if not model.dense_map:
        raise InputError(
            f"{settings.model.name} cannot annotate: its classifier reads the whole map, not "
            "places. Take a GC ViT, L2ViT, GLNet or unified model"
        )
    _check_out(out)
    files = [label_map_file(out, source.name(index)) for index in range(len(source))]
    if len(set(files)) < len(files):
        raise InputError(
            f"only {len(set(files))} of {len(files)} images differ in folder and name, by which "
            "label maps are found. Rename the images"
        )
    missing = [index for index, file in enumerate(files) if not os.path.isfile(file)]
    print(f"{len(files) - len(missing)} of {len(files)} images have a map in {out}")
    apply = as_function(model, scan=scans(settings.model, mesh))
    annotate = CompiledOnce(_annotating_step(apply, settings.dataset, mesh), "annotating step")
    batches = eval_batches(
        EvalTransform.from_config(settings, Subset(source, missing)),
        batch_size=round_up(settings.eval.batch_size, mesh),
        num_workers=settings.dataset.num_workers,
        need_some=False,  # those that a run before this one could not read may be all there are
    )
    unusable: list[int] = []  # images whose logits are not finite
    with contextlib.closing(batches), tqdm(total=len(missing), unit="image") as bar:
        for batch in batches:
            images = to_devices({"image": batch["image"]}, mesh)["image"]
            maps = np.asarray(annotate(weights, images))
            for label_map, index, counts in zip(maps, batch["index"], batch["mask"], strict=True):
                if counts and np.isfinite(label_map[0]).all():
                    _save(label_map, files[missing[index]], out)
                elif counts:
                    unusable.append(missing[index])
            bar.update(int(batch["mask"].sum()))
    if unusable:
        raise InputError(
            f"{len(unusable)} of {len(missing)} images get no map, such as "
            f"{source.name(unusable[0])}: their logits are NaN, infinite, or beyond the 65504 of "
            "float16. The weights are not usable as they are; with --config.model.dtype=float32 "
            "fewer numbers overflow"
        )
    return 0


def _annotating_step(apply, dataset: Dataset, mesh: Mesh):
    """Compiles `step(weights, uint8 images [B, H, W, 3]) → float16 [B, 2, K, h, w]`."""

    @on_mesh(mesh)
    def step(weights, images):
        images = normalise(images, dataset.mean, dataset.std)
        logits = apply(weights, images, method="dense_logits")
        highest, classes = jax.lax.top_k(logits, min(HIGHEST, logits.shape[-1]))
        maps = jnp.stack([highest.astype(jnp.float16), classes.astype(jnp.float16)], axis=1)
        return jnp.moveaxis(maps, -1, 2)

    return jax.jit(
        step,
        in_shardings=(replicated(mesh), batch_sharded(mesh)),
        out_shardings=replicated(mesh),
    )


def _check_out(out: str) -> None:
    check_local(out, "--out")
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out={out}: cannot make this folder: {error.strerror}") from error


def _save(label_map: np.ndarray, file: str, out: str) -> None:
    """Writes a map whole or not at all, below `out`, and through no link.

    Raises InputError, naming the file, if that cannot be.
    """
    import torch

    folder, part = os.path.dirname(file), f"{file}.part"
    try:
        os.makedirs(folder, exist_ok=True)
        top = os.path.realpath(out)
        if os.path.realpath(folder) not in (top, os.path.join(top, os.path.basename(folder))):
            raise InputError(
                f"{folder} is a link to {os.path.realpath(folder)}: label maps are written below "
                f"--out={out} only. Remove the link"
            )
        with contextlib.suppress(FileNotFoundError):
            os.unlink(part)  # what a kill left
        with open(part, "xb") as stream:  # a new file: no link is followed
            torch.save(torch.from_numpy(label_map.copy()), stream)
        os.replace(part, file)
    except OSError as error:
        raise InputError(f"cannot write label map {file}: {error.strerror or error}") from error


if __name__ == "__main__":
    out = flags.DEFINE_string("out", None, "Folder for the maps.", required=True)
    cli.run(
        lambda config, workdir: main(config, workdir, out.value, cli.given_fields()),
        needs_config=False,
    )
