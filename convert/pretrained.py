"""Released weights for a model that was just built."""

import jax.numpy as jnp
from flax import nnx

import convert
import hybrid_flax
from convert.download import download
from convert.state_dict import model_from_state_dict
from hybrid_flax import bridge
from hybrid_flax.fitting import fit


def load_pretrained(name: str, model: nnx.Module) -> None:
    """Fills `model`, built as `name`, with that model's released weights, downloaded if need be.

    A classifier for another number of classes stays fresh, and position tables are resized to the
    model's image size; both are printed.

    Raises:
      InputError: no weights are to be had, or the model was built with another architecture.
    """
    info = hybrid_flax.model_info(name)
    file = download(name, info)
    state = convert.load_checkpoint(file, entry=info.weights_entry)
    source, _ = model_from_state_dict(name, state)
    template = bridge.get_weights(model)
    fitted = fit(bridge.flatten(bridge.get_weights(source)), bridge.flatten(template), str(file))
    fitted = {path: jnp.asarray(array) for path, array in fitted.items()}
    bridge.set_weights(model, bridge.unflatten_like(template, fitted))
