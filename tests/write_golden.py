"""Writes the golden files of a model from the authors' PyTorch code.

python -m tests.write_golden NAME --reference=CHECKOUT --stage=stem:patch_embed --stage=…

Builds the official model from a checkout of its repository (`OFFICIAL` in the converter says where
it is made there), fills it with the weights that `reference.py` rebuilds anywhere, runs it on
images of the same kind, and writes what `parity.py` compares with:

NAME.json: name, source, weight_seed; shapes of `parameters`, `float_buffers` and `other_entries`
(what a seed does not fill), `unfilled` scalars; `overrides` of the variant; `cases`, each with
`image_shape_nhwc`, `seed`, `stages` (shape, mean, rms) and, with gradients, `labels`, `loss` and
`grads` (norm and projection of each parameter).
NAME.npz: of case 0 `logits_0`, and of each stage 64 samples, `stage_0_LABEL`.

A stage is a name among our `intermediates` and the module of theirs that gives the same; maps are
NCHW there, `--stage=LABEL:MODULE:NHWC` says otherwise. `python -m tests.parity NAME` then compares.
"""

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import hybrid_flax
from convert.official import build_official
from convert.state_dict import official_model
from hybrid_flax.errors import InputError
from hybrid_flax.run.ending import ending
from hybrid_flax.weights import bridge
from hybrid_flax.weights.functions import as_function
from tests import reference
from tests.parity import GOLDEN

WEIGHT_SEED = IMAGE_SEED = 0
LAYOUTS = ("NCHW", "NHWC")


class Stage(NamedTuple):
    """A map to record."""

    label: str  # among our `intermediates`
    module: str  # its path in the official model
    layout: str = "NCHW"  # of a rank-4 output; tokens [B, N, C] and vectors [B, C] are as they are

    @classmethod
    def parse(cls, text: str) -> "Stage":
        stage = cls(*text.split(":")) if text.count(":") in (1, 2) else None
        if stage is None or stage.layout not in LAYOUTS:
            raise argparse.ArgumentTypeError(
                f"{text!r}: expected LABEL:MODULE or LABEL:MODULE:NHWC"
            )
        return stage


def write(
    name: str,
    official: Any,
    folder: pathlib.Path,
    *,
    stages: Sequence[Stage],
    image_size: int,
    batch: int = 2,
    source: str = "",
    overrides: Mapping[str, Any] | None = None,
) -> pathlib.Path:
    """Measures a PyTorch model and writes its golden files.

    Args:
      name: of our model.
      official: the `torch.nn.Module`; its weights are replaced.
      folder: for NAME.json and NAME.npz; made if it is not there.
      stages: maps to record beside the logits.
      image_size: height and width.
      batch: images.
      source: repository and commit, for people.
      overrides: of our variant, with which our model is the same.

    Returns:
      The JSON file.

    Raises:
      InputError: a stage that one of the models does not have, or logits that are not finite.
    """
    import torch

    record = {"name": name, "source": source, "weight_seed": WEIGHT_SEED}
    record |= {"overrides": dict(overrides)} if overrides else {}
    official = official.eval()
    record |= _fill(official)
    shape = (batch, image_size, image_size, 3)
    images = torch.from_numpy(reference.images(IMAGE_SEED, shape).transpose(0, 3, 1, 2).copy())
    maps, handles = {}, _contiguous_gradients(official)
    modules = dict(official.named_modules())
    for stage in stages:
        if stage.module not in modules:
            raise InputError(
                f"--stage={stage.label}:{stage.module}: the official model has no {stage.module}"
            )
        handles.append(modules[stage.module].register_forward_hook(_keep(maps, stage)))
    output = official(images)
    logits = sum(output) if isinstance(output, tuple | list) else output
    if not bool(torch.isfinite(logits).all()):
        raise InputError(f"the official {name} gives logits that are not finite on these weights")
    labels = torch.arange(batch) * 7 % logits.shape[-1]
    loss = torch.nn.functional.cross_entropy(logits, labels)
    loss.backward()
    for handle in handles:
        handle.remove()
    case = {"seed": IMAGE_SEED, "image_shape_nhwc": list(shape)}
    case["stages"] = {label: _moments(array) for label, array in maps.items()}
    case |= {"labels": labels.tolist(), "loss": loss.item(), "grads": _gradients(official)}
    arrays = {f"stage_0_{label}": reference.samples(array) for label, array in maps.items()}
    arrays["logits_0"] = logits.detach().float().numpy()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    record |= {"torch": torch.__version__, "cases": [case]}
    file.write_text(json.dumps(record, separators=(",", ":")) + "\n")
    np.savez_compressed(file.with_suffix(".npz"), **arrays)
    return file


def _fill(official) -> dict[str, Any]:
    """Gives the model the weights of `reference.py`; returns what the record says of them."""
    import torch

    state = official.state_dict()
    shapes = {
        key: list(entry.shape)
        for key, entry in state.items()
        if entry.is_floating_point() and entry.ndim
    }
    filled = {
        key: torch.from_numpy(reference.weights(WEIGHT_SEED, key, tuple(shape)))
        for key, shape in shapes.items()
    }
    official.load_state_dict(state | filled)
    parameters = {key: list(parameter.shape) for key, parameter in official.named_parameters()}
    return {
        "parameters": parameters,
        "float_buffers": {key: shape for key, shape in shapes.items() if key not in parameters},
        "other_entries": {
            key: [list(entry.shape), str(entry.dtype)]
            for key, entry in state.items()
            if key not in shapes
        },
        "unfilled": {key: state[key].item() for key, shape in parameters.items() if not shape},
    }


def _contiguous_gradients(official) -> list:
    """Hooks that hand batch norms a contiguous gradient.

    PyTorch 2.13 on a CPU: in evaluation mode, for a gradient that comes back through a token layout
    (`flatten(2).transpose(1, 2)`), `BatchNorm2d` returns wrong gradients.
    """
    import torch

    def hook(module, inputs, output):
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient.contiguous())

    norms = torch.nn.modules.batchnorm._BatchNorm
    return [
        module.register_forward_hook(hook)
        for module in official.modules()
        if isinstance(module, norms)
    ]


def _keep(maps: dict[str, np.ndarray], stage: Stage):
    def hook(module, inputs, output):
        output = output[0] if isinstance(output, tuple | list) else output
        if output.ndim == 4 and stage.layout == "NCHW":
            output = output.permute(0, 2, 3, 1)
        maps[stage.label] = output.detach().float().contiguous().numpy()

    return hook


def _moments(array: np.ndarray) -> dict[str, Any]:
    exact = array.astype(np.float64)
    rms = float(np.sqrt(np.mean(np.square(exact))))
    return {"shape": list(array.shape), "mean": float(exact.mean()), "rms": rms}


def _gradients(official) -> dict[str, list[float]]:
    """Returns norm and projection of every parameter's gradient."""
    found = {}
    for key, parameter in official.named_parameters():
        if parameter.grad is not None:
            array = parameter.grad.numpy()
            projection = reference.projection(WEIGHT_SEED, key, array)
            found[key] = [float(np.linalg.norm(array.astype(np.float64))), projection]
    return found


def check_labels(name: str, stages: Sequence[Stage], image_size: int, overrides) -> None:
    """Raises InputError for no stage, or for one that our model's `intermediates` do not have."""
    model = bridge.abstract(lambda: hybrid_flax.create_model(name, **overrides))
    apply, weights = as_function(model), bridge.get_weights(model)
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    known = jax.eval_shape(lambda w, x: apply(w, x, method="intermediates"), weights, image)
    unknown = [stage.label for stage in stages if stage.label not in known]
    if unknown or not stages:
        raise InputError(
            f"--stage: {', '.join(unknown) or 'none is given'}; expected at least one of "
            f"{', '.join(known)}, each with the module of the official model that gives the same"
        )


def _commit(checkout: str) -> str:
    command = ["git", "-C", checkout, "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else "no commit known"


def main() -> int:
    return ending(_main, limited=False) or 0


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of a registered model")
    parser.add_argument("--reference", required=True, help="checkout of the official repository")
    parser.add_argument("--stage", action="append", type=Stage.parse, default=[])
    parser.add_argument("--overrides", type=json.loads, default={}, help="JSON, of our variant")
    parser.add_argument("--image_size", type=int, help="default: the model's own")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, help="default: tests/golden/FAMILY")
    options = parser.parse_args()
    name = options.name
    size = options.image_size or hybrid_flax.model_info(name).image_size
    overrides = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in options.overrides.items()
    }
    check_labels(name, options.stage, size, overrides)
    made = official_model(bridge.abstract(lambda: hybrid_flax.create_model(name)), name)
    file = write(
        name,
        build_official(made, pathlib.Path(options.reference)),
        options.out or GOLDEN / name.split("_")[0],
        stages=options.stage,
        image_size=size,
        batch=options.batch,
        source=f"{made.factory} of {made.module} at {_commit(options.reference)}",
        overrides=overrides,
    )
    print(f"wrote {file} and .npz; compare with: python -m tests.parity {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
