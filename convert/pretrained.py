"""Released weights for a model that was just built, or for a training run."""

import os
import pathlib

import jax.numpy as jnp
import numpy as np

import convert
from convert.download import download
from convert.state_dict import model_from_state_dict
from convert.tensors import check_finite
from hybrid_flax.models import registry
from hybrid_flax.models.backbone import Backbone
from hybrid_flax.weights import bridge
from hybrid_flax.weights.adapt import adapt
from hybrid_flax.weights.paths import flatten, unflatten_like


def load_pretrained(name: str, model: Backbone) -> None:
    """Fills `model`, built as `name`, with that model's released weights, downloaded if need be.

    A classifier for another number of classes stays fresh, and position tables are resized to the
    model's image size; both are printed.

    Raises:
      InputError: no weights are to be had, or the model was built with another architecture.
    """
    weights, file = released_weights(name)
    template = bridge.get_weights(model)
    fitted = adapt(weights, flatten(template), str(file), model.structure)
    fitted = {path: jnp.asarray(array) for path, array in fitted.items()}
    bridge.set_weights(model, unflatten_like(template, fitted))


def released_weights(
    name: str, file: str | os.PathLike | None = None
) -> tuple[dict[str, np.ndarray], pathlib.Path]:
    """({path: array} of a released checkpoint of the model `name`, its file).

    Args:
      name: of the model.
      file: of any format that `convert.load_checkpoint` reads; default: the one its authors
        published, downloaded if need be.

    Raises:
      InputError: no weights are to be had, the file is not of this model, or not all are finite.
    """
    info = registry.model_info(name)
    file = download(name, info) if file is None else pathlib.Path(file)
    state = convert.load_checkpoint(file, published=info.weights_entry)
    model, _ = model_from_state_dict(name, state)
    weights = flatten(bridge.get_weights(model))
    check_finite(weights, str(file))
    return weights, file
