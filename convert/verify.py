"""Proves that a released checkpoint computes here what it computes in PyTorch.

python -m convert.verify gcvit_b FILE
python -m convert.verify gcvit_b FILE --reference=PATH_OF_A_CHECKOUT_OF_THE_OFFICIAL_CODE
python -m convert.verify gcvit_b --download

Without --reference: conversion, round trip, published parameter count, finite outputs. With it, the
official PyTorch model runs beside ours on the same images, and every layer both have is compared.
Exit status: 0 all checks pass, 1 one fails, 2 the input cannot be used.
"""

import argparse
import contextlib
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

import convert
from convert.__main__ import ENTRY_HELP
from convert.download import download
from convert.official import run_official
from convert.state_dict import (
    layer_names,
    model_from_state_dict,
    official_model,
    release_state,
)
from hybrid_flax.data import eval_crop
from hybrid_flax.data.images import open_photo, rgb
from hybrid_flax.data.sources.base import IMAGE_SUFFIXES, MOST_BYTES
from hybrid_flax.data.sources.walk import say, walk
from hybrid_flax.errors import InputError
from hybrid_flax.models import registry
from hybrid_flax.models.info import ModelInfo
from hybrid_flax.run.ending import ending
from hybrid_flax.settings.arguments import with_home
from hybrid_flax.text_files import read_bytes
from hybrid_flax.weights import bridge
from hybrid_flax.weights.functions import as_recording_function

# In float32 on a CPU, relative L2. What rounding does is ten to a hundred times smaller.
LOGITS_BAR, LAYERS_BAR = 1e-4, 2e-4


def verify(
    name: str,
    file: pathlib.Path,
    *,
    reference: str | None = None,
    images: str | None = None,
    entry: str | None = None,
) -> dict[str, Any]:
    """Runs all checks; see the module's docstring.

    Args:
      name: of the model.
      file: its checkpoint.
      reference: path of a checkout of the authors' repository.
      images: folder of images; default: two photographs that come with scikit-learn.
      entry: of the file; default: the model's own, else as `load_checkpoint` finds it.

    Returns:
      {"model", "file", "checks": {name: {"passed", "detail"}}, "passed"}, and with a reference
      "layers": [{"layer", "relative_error", "cosine", "max_abs"}] in calling order,
      "first_difference": name of the first layer outside the bar or None, "top1_agreement".

    Raises:
      InputError: something that was given cannot be used at all. Weights that do not fit the model
        are a failed check.
    """
    info = registry.model_info(name)
    state = convert.load_checkpoint(file, entry=entry, published=info.weights_entry)
    report: dict[str, Any] = {"model": name, "file": str(file), "checks": {}}

    def check(what: str, passed: bool, detail: str) -> bool:
        report["checks"][what] = {"passed": bool(passed), "detail": detail}
        report["passed"] = all(each["passed"] for each in report["checks"].values())
        return passed

    try:
        model, classes = model_from_state_dict(name, state)
    except InputError as error:
        check("conversion", False, str(error))
        return report
    check("conversion", True, f"{len(state)} entries, each used once; {classes} classes")

    exported, state = convert.to_state_dict(model), release_state(model, state)
    changed = [key for key in state if not _same(exported[key], state[key])]
    widened = {
        f"{array.dtype} as {exported[key].dtype}"
        for key, array in state.items()
        if array.dtype != exported[key].dtype
    }
    same = f"values, {', '.join(sorted(widened))}" if widened else "bits"
    check("round trip", not changed, _shortened(changed) or f"the same keys, layouts and {same}")

    count = sum(leaf.size for leaf in jax.tree.leaves(bridge.get_weights(model)["params"]))
    detail = (
        f"{count:,}, the official model has {info.parameters:,} with 1000 classes and "
        f"{info.image_size} pixels"
    )
    as_released = (classes, model.image_size) == (1000, info.image_size)
    check("parameters", not as_released or count == info.parameters, detail)

    assert isinstance(model.image_size, int)  # as releases are
    batch = _images(info, model.image_size, images)
    run = jax.jit(as_recording_function(model))
    logits, ours = run(bridge.get_weights(model), jnp.asarray(batch))
    finite = bool(np.isfinite(logits).all())
    check("outputs", finite, f"finite on {len(batch)} images" if finite else "not all finite")
    if reference and finite:
        # The export, and not the file: that may lack counters and buffers, or be half precision.
        theirs = run_official(official_model(model, name), reference, exported, batch)
        _compare(report, check, model, np.asarray(logits), ours, theirs)
    return report


def _compare(report, check, model, logits, ours: Mapping[str, Any], theirs: Mapping[str, Any]):
    names, layers = layer_names(model), list[dict[str, Any]]()
    for path, (_, array) in sorted(ours.items(), key=lambda item: item[1][0]):
        official = names.get(path)
        if official is None or official not in theirs:
            continue
        array = np.asarray(array, np.float64)
        other = _in_our_layout(theirs[official], array.shape)
        if other is not None:
            layers.append({"layer": path, "official": official} | _errors(array, other))
    output = _errors(logits.astype(np.float64), theirs[""])
    layers.append({"layer": "logits", "official": "output"} | output)
    outside = [layer["layer"] for layer in layers[:-1] if layer["relative_error"] > LAYERS_BAR]
    same = np.mean(logits.argmax(-1) == theirs[""].argmax(-1))
    report["layers"] = layers
    report["first_difference"] = outside[0] if outside else None
    report["top1_agreement"] = float(same)
    detail = f"{len(layers) - 1} compared, worst {max(x['relative_error'] for x in layers):.1e}"
    if outside:
        detail += f"; {outside[0]} is the first to differ"
    check("layers", not outside, detail)
    detail = f"relative error {output['relative_error']:.1e}, the same top-1 on {same:.0%}"
    check("logits", output["relative_error"] <= LOGITS_BAR and same == 1, detail)


def _errors(got: np.ndarray, want: np.ndarray) -> dict[str, float]:
    got, want = got.ravel().astype(np.float64), want.ravel().astype(np.float64)
    length = max(float(np.linalg.norm(want)), 1e-30)
    return {
        "relative_error": float(np.linalg.norm(got - want)) / length,
        "cosine": float(got @ want) / max(float(np.linalg.norm(got)) * length, 1e-30),
        "max_abs": float(np.abs(got - want).max()),
    }


def _in_our_layout(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """An official output as NHWC; None if it is cut up in another way (windows, heads)."""
    if array.shape == shape:
        return array
    if array.ndim == 4 and (*array.shape[:1], *array.shape[2:], array.shape[1]) == shape:
        return array.transpose(0, 2, 3, 1)
    tokens = (shape[0], int(np.prod(shape[1:-1])), shape[-1])
    if array.ndim == 3 and array.shape == tokens:
        return array.reshape(shape)
    return None


def _same(exported: np.ndarray, array: np.ndarray) -> bool:
    """Bit for bit; the same values where half precision was widened. NaN is the same as NaN."""
    if exported.dtype == array.dtype:
        return exported.shape == array.shape and exported.tobytes() == array.tobytes()
    return np.array_equal(exported, array, equal_nan=True)


def _shortened(keys: list[str]) -> str:
    more = f" and {len(keys) - 5} more" if len(keys) > 5 else ""
    return f"changed: {', '.join(keys[:5])}{more}" if keys else ""


def _images(info: ModelInfo, image_size: int, folder: str | None) -> np.ndarray:
    """[B, H, W, 3] float32, as the model's own evaluation prepares them."""
    if folder is None:
        from sklearn.datasets import load_sample_images

        photographs = [Image.fromarray(array) for array in load_sample_images().images]
    else:
        found = walk(folder, IMAGE_SUFFIXES)
        if not found.files:
            raise InputError(
                f"--images={folder} holds no {', '.join(IMAGE_SUFFIXES)} files"
                + (f"; left out: {say(found.reasons(folder))}" if found.left_out else "")
            )
        files = found.files[:16]
        photographs = [rgb(open_photo(read_bytes(file, MOST_BYTES), file)) for file in files]
    crop = info.eval_transform
    pixels = [
        eval_crop(
            photograph,
            image_size=image_size,
            crop_fraction=crop.crop_fraction,
            crop_mode=crop.crop_mode,
            interpolation=crop.interpolation,
        )
        for photograph in photographs
    ]
    batch = np.stack(pixels).astype(np.float32) / 255
    return (batch - np.asarray(crop.mean, np.float32)) / np.asarray(crop.std, np.float32)


def show(report: Mapping[str, Any]) -> str:
    """The report for a person: the checks, and the worst layer of each part of the model."""
    lines = [f"{report['model']}, {report['file']}"]
    for what, check in report["checks"].items():
        lines.append(f"  {'pass' if check['passed'] else 'FAIL'}  {what:<11} {check['detail']}")
    if "layers" in report:
        groups: dict[str, list] = {}
        for layer in report["layers"]:
            parts = layer["layer"].split("/")
            groups.setdefault(
                "/".join(parts[:2] if parts[0] == "stages" else parts[:1]), []
            ).append(layer)
        lines.append(
            "\n  | part | layers | relative error | cosine | max abs |\n  |---|---|---|---|---|"
        )
        for part, layers in groups.items():
            worst = max(layers, key=lambda layer: layer["relative_error"])
            lines.append(
                f"  | {part} | {len(layers)} | {worst['relative_error']:.1e} | "
                f"{min(layer['cosine'] for layer in layers):.7f} | {worst['max_abs']:.1e} |"
            )
    lines.append("all checks pass" if report["passed"] else "NOT all checks pass")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    return ending(lambda: _main(arguments), limited=False) or 0


def _main(arguments: list[str] | None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m convert.verify", description=__doc__.splitlines()[0]
    )
    parser.add_argument("model", help="name of the model, such as gcvit_b")
    parser.add_argument("file", nargs="?", help="the released file (.pth.tar, .pth, .safetensors)")
    parser.add_argument("--download", action="store_true", help="fetch the released file")
    parser.add_argument("--reference", metavar="PATH", help="checkout of the official repository")
    parser.add_argument("--images", metavar="DIR", help="folder of images; default: built-in ones")
    parser.add_argument("--entry", help=ENTRY_HELP)
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")
    return _verify(parser.parse_args(with_home(sys.argv[1:] if arguments is None else arguments)))


def _verify(options: argparse.Namespace) -> int:
    if (options.file is None) != options.download:
        raise InputError("give either the file or --download")
    file = options.file or download(options.model, registry.model_info(options.model))
    with contextlib.redirect_stdout(sys.stderr):  # what is said on the way; the report follows
        report = verify(
            options.model,
            pathlib.Path(file),
            reference=options.reference,
            images=options.images,
            entry=options.entry,
        )
    print(json.dumps(report, indent=1) if options.json else show(report))
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
