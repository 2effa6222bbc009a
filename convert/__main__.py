"""Converts a released PyTorch checkpoint: python -m convert gcvit_b FILE --out=DIR

DIR can then be evaluated (`python -m hybrid_flax.evaluate --workdir=DIR`) and fine-tuned from
(`python -m hybrid_flax.main --config.init_from=DIR`).
"""

import argparse
import hashlib
import os
import sys

import jax

import convert
from convert.state_dict import model_from_state_dict
from convert.tensors import check_finite
from hybrid_flax.errors import InputError
from hybrid_flax.models import registry
from hybrid_flax.run.checkpoints import Checkpoints
from hybrid_flax.run.ending import ending
from hybrid_flax.settings.arguments import with_home
from hybrid_flax.weights import bridge
from hybrid_flax.weights.class_map import read_class_map, select_classes
from hybrid_flax.weights.paths import flatten, unflatten_like

_LARGEST = 2048  # pixels
ENTRY_HELP = "entry with the weights: model, ema/module, . for the file itself; default: found"


def main(arguments: list[str] | None = None) -> int:
    return ending(lambda: _main(arguments), limited=False) or 0


def _main(arguments: list[str] | None) -> None:
    parser = argparse.ArgumentParser(prog="python -m convert", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="name of the model, such as gcvit_b")
    parser.add_argument("file", help="the released file (.pth.tar, .pth, .safetensors)")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--entry", help=ENTRY_HELP)
    parser.add_argument(
        "--class_map", metavar="FILE", help="keep only these rows of the classifier, one a line"
    )
    parser.add_argument("--image_size", type=int, help="pixels; default: as the file's tables say")
    print(_convert(parser.parse_args(with_home(sys.argv[1:] if arguments is None else arguments))))


def _convert(options: argparse.Namespace) -> str:
    info = registry.model_info(options.model)
    if not options.out:
        raise InputError("--out is empty: expected a folder to write to")
    if os.path.exists(options.out) and not os.path.isdir(options.out):
        raise InputError(f"--out={options.out} is a file: expected a folder to write to")
    checkpoints = Checkpoints(os.path.join(options.out, "checkpoints"))
    if checkpoints.steps():
        raise InputError(f"--out={options.out} holds checkpoints already; choose another folder")
    if options.image_size is not None and not 1 <= options.image_size <= _LARGEST:
        raise InputError(f"--image_size={options.image_size}: expected 1 to {_LARGEST} pixels")
    state = convert.load_checkpoint(options.file, entry=options.entry, published=info.weights_entry)
    model, num_classes = model_from_state_dict(options.model, state, image_size=options.image_size)
    weights = bridge.get_weights(model)
    flat = flatten(weights)
    check_finite(flat, options.file)
    if options.class_map:
        rows = read_class_map(options.class_map, None)
        weights = unflatten_like(weights, select_classes(flat, rows, model.structure))
        num_classes = len(rows)

    with open(options.file, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    meta = {
        "model": options.model,
        "num_classes": num_classes,
        "image_size": model.image_size,
        "source": os.path.basename(options.file),
        "sha256": sha256,
    }
    checkpoints.save(0, weights, meta)
    checkpoints.wait()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(weights["params"]))
    return (
        f"{options.model}: {len(state)} entries, {parameters:,} parameters, {num_classes} classes, "
        f"{model.image_size} pixels → {options.out}\n  from {options.file}, sha256 {sha256}\n"
        f"  licence: {info.licence}"
    )


if __name__ == "__main__":
    sys.exit(main())
