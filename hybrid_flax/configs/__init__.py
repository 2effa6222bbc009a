"""One config per model; each is a recipe from `recipes.py` and the model's name."""

import functools
import importlib
import pathlib

from ml_collections import ConfigDict

_NOT_OF_ONE_MODEL = ("__init__", "arguments", "finetune", "quickstart", "recipes")


@functools.cache
def names() -> tuple[str, ...]:
    """Lists the configs of the models, which train them as their papers did."""
    files = pathlib.Path(__file__).parent.glob("*.py")
    return tuple(sorted({file.stem for file in files}.difference(_NOT_OF_ONE_MODEL)))


def load(name: str) -> ConfigDict:
    """Makes the config of that name anew: "gcvit_t", "quickstart", "finetune"."""
    return importlib.import_module(f"hybrid_flax.configs.{name}").get_config()
