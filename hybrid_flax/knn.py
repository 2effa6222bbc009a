"""How good a model's features are without training anything: k nearest neighbours.

python -m hybrid_flax.knn --workdir=DIR [--config=configs/gcvit_b.py]

DIR is the work directory of a training run, or what `python -m convert` wrote, which needs a
config. Settings are the run's but for those that are given, as in `hybrid_flax.evaluate`. The
classifier is not used, so that other images may be given: `--config.dataset.name=…`, `…path=…`.
`--neighbours` and `--temperature` change what DINO uses.
"""

import contextlib
import logging
from collections.abc import Collection

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from hybrid_flax import cli
from hybrid_flax.as_trained import as_trained
from hybrid_flax.build import abstract_model, open_splits
from hybrid_flax.data.loader import eval_batches
from hybrid_flax.data.sources import Source
from hybrid_flax.data.transforms import EvalTransform
from hybrid_flax.distributed.batch import batch_sharded, round_up, to_devices
from hybrid_flax.distributed.mesh import make_mesh, on_mesh, replicated
from hybrid_flax.errors import InputError
from hybrid_flax.models.structure import Structure
from hybrid_flax.run.checkpoint_files import Arrays
from hybrid_flax.run.compiling import CompiledOnce
from hybrid_flax.run.saved_weights import load_weights
from hybrid_flax.scan_choice import scans
from hybrid_flax.settings import Dataset, Settings, replace
from hybrid_flax.training.batch_augmentation import normalise
from hybrid_flax.weights import bridge
from hybrid_flax.weights.adapt import adapt
from hybrid_flax.weights.functions import as_function
from hybrid_flax.weights.paths import flatten, unflatten_like

NEIGHBOURS, TEMPERATURE = 20, 0.07
_CHUNK = 256  # queries at a time


def knn_predictions(
    queries: Float[np.ndarray, "N D"],
    bank: Float[np.ndarray, "M D"],
    labels: Int[np.ndarray, "M"],
    num_classes: int,
    *,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> Int[np.ndarray, "N"]:
    """The class of each query by its nearest neighbours in the bank, as DINO measures it.

    Features have length 1. The `neighbours` with the largest cosine similarity s vote for their
    class with the weight exp(s/temperature) (arXiv:1805.01978, section 3.4; arXiv:2104.14294).

    Raises:
      InputError: more neighbours than the bank has, or a temperature that is not positive.
    """
    _check(neighbours, temperature, len(bank))
    bank, labels = jnp.asarray(bank), jnp.asarray(labels)

    @jax.jit
    def predict(queries):
        similarity, nearest = jax.lax.top_k(queries @ bank.T, neighbours)
        # Relative to the best, which changes no vote: exp(1/temperature) may be too large.
        votes = jnp.exp((similarity - similarity[:, :1]) / temperature)
        classes = jax.nn.one_hot(labels[nearest], num_classes, dtype=votes.dtype)
        return jnp.einsum("nk,nkc->nc", votes, classes).argmax(-1)

    chunks = [predict(queries[i : i + _CHUNK]) for i in range(0, len(queries), _CHUNK)]
    return np.concatenate(chunks) if chunks else np.zeros(0, np.int32)


def _check(neighbours: int, temperature: float, images: int) -> None:
    if not 1 <= neighbours <= images:
        raise InputError(
            f"--neighbours={neighbours}: expected a number from 1 to {images}, the training "
            "images that there are"
        )
    if not temperature > 0:
        raise InputError(f"--temperature={temperature}: expected a number above 0")


def pooled_features(apply, weights, images: Array) -> Float[Array, "B D"]:
    """The classifier's input: the pooled last map. Those of several heads follow each other."""
    maps = apply(weights, images, method="intermediates")
    pooled = [maps[name] for name in maps if name.startswith("pooled")]
    return jnp.concatenate(pooled, axis=-1).astype(jnp.float32)


def make_feature_step(apply, dataset: Dataset, mesh: Mesh):
    """Compiles `step(weights, uint8 images [B, H, W, 3]) → features of length 1 [B, D]`."""

    @on_mesh(mesh)
    def feature_step(weights, images):
        images = normalise(images, dataset.mean, dataset.std)
        features = pooled_features(apply, weights, images)
        return features / jnp.linalg.norm(features, axis=-1, keepdims=True)

    return jax.jit(
        feature_step,
        in_shardings=(replicated(mesh), batch_sharded(mesh)),
        out_shardings=replicated(mesh),
    )


def extract(
    feature_step, weights, source: Source, config: Settings, mesh: Mesh
) -> tuple[Float[np.ndarray, "N D"], Int[np.ndarray, "N"]]:
    """(features, labels) of a source's readable images, in evaluation crops.

    Images whose features are not finite are left out, and it is said.

    Raises:
      InputError: no image is left.
    """
    batches = eval_batches(
        EvalTransform.from_config(config, source),
        batch_size=round_up(config.eval.batch_size, mesh),
        num_workers=config.dataset.num_workers,
    )
    features, labels, read = [], [], 0
    with contextlib.closing(batches):
        for batch in batches:
            images = to_devices({"image": batch["image"]}, mesh)["image"]
            found = np.asarray(feature_step(weights, images))
            counted = batch["mask"] > 0
            finite = counted & np.isfinite(found).all(axis=-1)
            features.append(found[finite])
            labels.append(batch["label"][finite])
            read += int(counted.sum())
    kept = sum(map(len, labels))
    if not kept:
        raise InputError(
            f"the features of all {read} images that can be read are NaN or infinite: the weights "
            "are not usable as they are"
            if read
            else f"none of {len(source)} images can be read. Mend them, or give others: "
            "--config.dataset.path="
        )
    if kept < read:
        logging.warning("%d of %d images have NaN or infinite features", read - kept, read)
    return np.concatenate(features), np.concatenate(labels)


def _without_classifier(loaded: Arrays, like: Arrays, origin: str, structure: Structure) -> Arrays:
    """The weights of the features, by path; zeros for the classifier, which is not used."""
    loaded, body = (
        {path: leaf for path, leaf in arrays.items() if not structure.is_classifier(path)}
        for arrays in (loaded, like)
    )
    classifier = {p: np.zeros(like[p].shape, like[p].dtype) for p in like.keys() - body.keys()}
    return adapt(loaded, body, origin, structure) | classifier


def main(
    config: ml_collections.ConfigDict | None,
    workdir: str,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    given: Collection[str] | None = None,
) -> int:
    """Prints the top-1 accuracy of the validation images by the training images around them.

    Args:
      config, given: see `as_trained`.
    """
    loaded = load_weights(workdir)
    asked = as_trained(config, loaded.meta, given)
    # The classes are those of the images: the model's classifier is not used.
    settings, train, val = open_splits(replace(asked, {"model.num_classes": 0}))
    _check(neighbours, temperature, len(train))  # before the minutes that features take
    mesh, model = make_mesh(**vars(settings.mesh)), abstract_model(settings)
    template = bridge.get_weights(model)
    origin = f"the checkpoint in {workdir}"
    fitted = _without_classifier(loaded.best, flatten(template), origin, model.structure)
    weights = jax.device_put(unflatten_like(template, fitted), replicated(mesh))
    apply = as_function(model, scan=scans(settings.model, mesh))
    feature_step = CompiledOnce(make_feature_step(apply, settings.dataset, mesh), "feature step")
    bank, bank_labels = extract(feature_step, weights, train, settings, mesh)
    queries, labels = extract(feature_step, weights, val, settings, mesh)
    predicted = knn_predictions(
        queries,
        bank,
        bank_labels,
        settings.model.num_classes,
        neighbours=neighbours,
        temperature=temperature,
    )
    print(
        f"{settings.model.name} at step {loaded.step} of {workdir}, {settings.dataset.name}:\n"
        f"  {'averaged' if loaded.averaged else 'trained'} weights: top-1 "
        f"{100 * np.mean(predicted == labels):.2f} % of {len(labels)} images, by the {neighbours} "
        f"nearest of {len(bank)} training images"
    )
    return 0


if __name__ == "__main__":
    _neighbours = flags.DEFINE_integer("neighbours", NEIGHBOURS, "How many vote.")
    _temperature = flags.DEFINE_float("temperature", TEMPERATURE, "Of the votes' weights.")
    cli.run(
        lambda config, workdir: main(
            config, workdir, _neighbours.value, _temperature.value, cli.given_fields()
        ),
        needs_config=False,
    )
