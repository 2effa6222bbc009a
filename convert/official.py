"""Runs the authors' PyTorch model from the user's own checkout of their repository."""

import contextlib
import importlib
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from hybrid_flax.errors import InputError


class Official(NamedTuple):
    """The place in the official repository that makes a model."""

    folder: str  # below the repository's root, from which its code imports
    module: str  # such as "models.gc_vit"
    factory: str  # function or class in it
    arguments: Mapping[str, Any] = {}


def run_official(
    official: Official, repository: str, state: Mapping[str, np.ndarray], images: np.ndarray
) -> dict[str, np.ndarray]:
    """Returns what every layer of the official model gives for some images, in evaluation mode.

    Args:
      official: which model.
      repository: path of a checkout of the authors' repository.
      state: the weights, as `convert.to_state_dict` returns them.
      images: float32 [B, H, W, 3], normalised.

    Returns:
      {module path: float32 array, in PyTorch's layout}, and the model's output under "".

    Raises:
      InputError: the repository is not that one, its code cannot be imported here, or its model
        does not take exactly these weights.
    """
    import torch

    model = build_official(official, pathlib.Path(repository))
    try:
        model.load_state_dict({key: torch.from_numpy(np.array(x)) for key, x in state.items()})
    except RuntimeError as error:  # PyTorch lists every missing, unexpected and mis-shaped key
        raise InputError(
            f"{official.factory} of {repository} does not take these weights. It is made as for "
            "the released file: give that file, or leave --reference out to check this one "
            f"without the official model. {_shortened(str(error))}"
        ) from error
    outputs: dict[str, np.ndarray] = {}

    def keep(name):
        def hook(module, inputs, output):
            while isinstance(output, tuple | list) and name and output:
                output = output[0]
            if isinstance(output, torch.Tensor) and name not in outputs:
                outputs[name] = output.detach().float().numpy().copy()

        return hook

    for name, module in model.named_modules():
        if name:
            module.register_forward_hook(keep(name))
    with torch.inference_mode():
        output = model.eval()(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    if isinstance(output, tuple | list):  # several heads, which are evaluated by their sum
        output = sum(each.float() for each in output)
    outputs[""] = output.float().numpy()
    return outputs


def _shortened(text: str) -> str:
    """PyTorch's list of keys: its first lines, and of these what a line of a screen holds."""
    lines = [line[:200] for line in text.splitlines()]
    return "\n".join(lines[:6] + [f"… and {len(lines) - 6} more lines"] * (len(lines) > 6))


def build_official(official: Official, repository: pathlib.Path) -> Any:
    """Makes the official model, a `torch.nn.Module` with its own initial weights.

    Raises:
      InputError: the repository is not that one, or its code cannot be imported here.
    """
    folder = repository / official.folder
    path = folder.joinpath(*official.module.split("."))
    if not path.is_dir() and not path.with_suffix(".py").is_file():
        raise InputError(
            f"--reference={repository} has no {path.relative_to(repository)}.py: give the root of a"
            " checkout of the authors' repository"
        )
    with _import_path(folder):
        try:
            module = importlib.import_module(official.module)
            return getattr(module, official.factory)(**official.arguments)
        except (ImportError, AttributeError, TypeError, NotImplementedError) as error:
            raise InputError(
                f"{official.factory} of {path} cannot be made here: {type(error).__name__}: "
                f"{error}. Install what that repository requires (an old timm, usually) in this "
                "environment"
            ) from error


@contextlib.contextmanager
def _import_path(root: pathlib.Path):
    sys.path.insert(0, os.fspath(root))
    try:
        yield
    finally:
        sys.path.remove(os.fspath(root))
