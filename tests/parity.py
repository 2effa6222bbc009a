"""Compares our models with what the official PyTorch code gave: make parity

python -m tests.parity [NAME …] [--golden=DIR] [--save=benchmarks/results/parity.json]

`tests/golden/FAMILY/NAME.json` and `.npz` hold, for weights and images that `reference.py`
rebuilds, the official logits, samples and moments of every stage, the loss, and each parameter
gradient's norm and projection; `write_golden.py` makes them. `--save` puts the figures of this run
in the place of the same models' older ones and keeps all others.
"""

import argparse
import contextlib
import json
import os
import pathlib
import platform
import re
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import convert
import hybrid_flax
from hybrid_flax import list_models
from hybrid_flax.costs.flops import count_multiply_adds
from hybrid_flax.run.ending import ending
from hybrid_flax.training.losses import cross_entropy, gramian, token_labelling
from hybrid_flax.versions import versions
from hybrid_flax.weights import bridge
from hybrid_flax.weights.functions import as_function, as_training_function
from tests import reference

GOLDEN = pathlib.Path(__file__).parent / "golden"
Figures = dict[str, Any]  # what --save writes

# In float32 on a CPU, relative to the reference.
BARS = {"logits": 1e-4, "stages": 1e-4, "loss": 1e-4, "norms": 1e-3, "projections": 1e-3}


class Parity(NamedTuple):
    """One golden case; each number is the worst over what it covers, None where not recorded."""

    case: str  # the golden file's name, and "train" for a pass with batch statistics
    images: str
    logits: float  # relative L2
    stages: float  # relative L2 of samples, and of mean and rms against the rms
    loss: float | None  # relative
    norms: float | None  # gradient norms, relative, over all parameters
    projections: float | None  # gradient projections, relative to the norm
    seconds: float

    @property
    def bars(self) -> dict[str, float]:
        # Gradients that jump: of deformable sampling where a sample crosses the pixel lattice; of
        # the ReLUs in stage 5 of the Gramian models, where rounding decides the sign of an input
        # (of 200,000, two within 4e-6 of zero; switching them brings the rest to 3e-5).
        jumps = "internimage" in self.case or re.match(r"ga_.*\(train\)", self.case)
        return BARS | ({"norms": 2e-2, "projections": 2e-2} if jumps else {})

    @property
    def passes(self) -> bool:
        numbers = ((getattr(self, name), bar) for name, bar in self.bars.items())
        return all(number is None or number <= bar for number, bar in numbers)


class Golden(NamedTuple):
    """A golden file, and the model it is of, filled with the weights that it was made with."""

    record: dict
    arrays: Mapping[str, np.ndarray]
    model: nnx.Module
    is_detection: bool


def load(file: pathlib.Path) -> Golden:
    """Builds and fills the model; also asserts that conversion round-trips to the bit."""
    record = json.loads(file.read_text())
    name, _, detection = record["name"].partition("_det_")
    name = name.removesuffix("_bottleneck")
    overrides = {"drop_path": 0.0}
    for key, value in record.get("overrides", {}).items():
        overrides[key] = tuple(value) if isinstance(value, list) else value
    overrides |= {"detection": True} if detection else {}
    if record["name"].endswith("_bottleneck"):
        overrides["stage5"] = "bottleneck"
    model = bridge.abstract(lambda: hybrid_flax.create_model(name, **overrides))
    state = golden_state(record)
    convert.load_state_dict(model, state)
    exported = convert.to_state_dict(model)
    derived = {key for key in record["other_entries"] if key not in state}
    assert set(exported) == set(state) | derived, set(exported) ^ (set(state) | derived)
    assert all(np.array_equal(exported[key], state[key]) for key in state), "export is not exact"
    return Golden(record, np.load(file.with_suffix(".npz")), model, bool(detection))


def golden_state(record: dict) -> dict[str, np.ndarray]:
    """The state_dict a golden file was made with, but for what follows from the architecture."""
    shapes = record["parameters"] | record["float_buffers"]
    state = {
        key: reference.weights(record["weight_seed"], key, tuple(shape))
        for key, shape in shapes.items()
        if shape
    }
    scalars = dict.fromkeys((key for key, shape in shapes.items() if not shape), 1.0)
    state |= {
        key: np.float32(value) for key, value in (scalars | record.get("unfilled", {})).items()
    }
    for suffix, change in record.get("weight_overrides", {}).items():
        for key in state:
            if key.endswith(suffix) and isinstance(change, str):
                state[key] = state[key] * np.float32(change.rsplit("*")[-1])
            elif key.endswith(suffix):
                state[key] = np.full_like(state[key], change)
    return state


def compare(file: pathlib.Path, *, gradients: bool = True) -> Iterator[Parity]:
    """Runs all cases of one golden file; without `gradients` what evaluation computes alone."""
    golden = load(file)
    for index in range(len(golden.record["cases"])):
        yield _compare_evaluation(golden, index, gradients)
    if "train" in golden.record and gradients:
        yield _compare_training(golden)
    jax.clear_caches()  # fifty models' programs would fill the memory


def _compare_evaluation(golden: Golden, index: int, gradients: bool) -> Parity:
    start = time.perf_counter()
    case, arrays = golden.record["cases"][index], golden.arrays
    apply, weights = as_function(golden.model), bridge.get_weights(golden.model)
    images = jnp.asarray(reference.images(case["seed"], tuple(case["image_shape_nhwc"])))

    def forward(weights, images):
        maps = apply(weights, images, method="intermediates")
        if golden.is_detection:  # has no classifier: what was recorded as logits is this
            pooled = [maps[f"out{stage}"].mean((1, 2)) for stage in range(1, 5)]
            maps["logits"] = jnp.concatenate(pooled, axis=-1)
        return maps

    maps = jax.jit(forward)(weights, images)
    maps = {label: np.asarray(value) for label, value in maps.items()}
    stages = 0.0
    for label, want in case["stages"].items():
        got = maps[label]
        assert got.size == np.prod(want["shape"]), f"{label}: {got.shape}, {want['shape']}"
        rms = np.sqrt(np.mean(np.square(got, dtype=np.float64)))
        stages = max(
            stages,
            _distance(reference.samples(got), arrays[f"stage_{index}_{label}"]),
            abs(rms / want["rms"] - 1),
            abs(got.mean(dtype=np.float64) - want["mean"]) / want["rms"],
        )
    logits = _distance(maps["logits"], arrays[f"logits_{index}"])
    if f"heads_{index}" in arrays:
        logits = max(logits, _distance(maps["head_logits"], arrays[f"heads_{index}"]))
    loss = norms = projections = None
    if "grads" in case and gradients:

        def loss_of(params, labels):
            logits = forward(weights | {"params": params}, images)["logits"]
            return cross_entropy(logits, jax.nn.one_hot(labels, logits.shape[-1])).mean()

        value, grads = jax.jit(jax.value_and_grad(loss_of))(
            weights["params"], jnp.asarray(case["labels"])
        )
        loss = abs(float(value) / case["loss"] - 1)
        norms, projections = _gradient_errors(golden, grads, case["grads"])
    return Parity(
        golden.record["name"], _describe(case), logits, stages, loss, norms, projections,
        time.perf_counter() - start,
    )  # fmt: skip


def _compare_training(golden: Golden) -> Parity:
    """One pass with batch statistics and no drop path: outputs, new statistics, loss, gradients."""
    start = time.perf_counter()
    train, arrays = golden.record["train"], golden.arrays
    case = train["case"]
    apply = as_training_function(golden.model)
    weights = bridge.get_weights(golden.model)
    shape = (case["batch"], *case["size"], 3)
    images = jnp.asarray(reference.images(case["seed"], shape))

    if "lambda" in train:
        targets = jnp.asarray(reference.soft_labels("ga-targets", (shape[0], 1000)))

        def loss_of(outputs):
            return gramian(outputs, targets, train["lambda"])
    elif "box" in train:
        labels = jnp.asarray(reference.soft_labels("glnet-token-labels", (shape[0], 1000, 51)))
        targets, tokens = labels[..., 1], labels[..., 2:].swapaxes(1, 2)

        def loss_of(outputs):
            return token_labelling(outputs, targets, tokens, 0.5)
    else:
        targets = jax.nn.one_hot(jnp.asarray(train["labels"]), 1000)

        def loss_of(outputs):
            return cross_entropy(outputs, targets).mean()

    def objective(params):
        outputs, batch_stats = apply(
            weights | {"params": params}, images, train=True, key=jax.random.key(0)
        )
        return loss_of(outputs), (outputs, batch_stats)

    fixed_box = contextlib.nullcontext()
    if "box" in train:
        row0, column0, row1, column1 = train["box"]
        fixed_box = mock.patch(
            "hybrid_flax.models.glnet.model.mix_token_box",
            return_value=(row0, row1, column0, column1),
        )
    with fixed_box:
        (value, (outputs, batch_stats)), grads = jax.jit(
            jax.value_and_grad(objective, has_aux=True)
        )(weights["params"])

    if "box" in train:
        samples = reference.samples(np.asarray(outputs["token_logits"]), 8192)
        logits = max(
            _distance(np.asarray(outputs["logits"]), arrays["train_cls"]),
            _distance(samples, arrays["train_aux_samples"]),
        )
    else:
        name = "train_heads" if "lambda" in train else "train_logits"
        logits = _distance(np.asarray(outputs), arrays[name])
    norms, projections = _gradient_errors(golden, grads, train["grads"])
    bridge.set_weights(golden.model, weights | {"batch_stats": batch_stats})
    exported = convert.to_state_dict(golden.model)
    bridge.set_weights(golden.model, weights)
    statistics = max(
        _distance(exported[key.removeprefix("train_bn:")], arrays[key])
        for key in arrays
        if key.startswith("train_bn:")
    )
    return Parity(
        f"{golden.record['name']} (train)", "×".join(map(str, shape[:3])), logits, statistics,
        abs(float(value) / train["loss"] - 1), norms, projections, time.perf_counter() - start,
    )  # fmt: skip


def _describe(case: dict) -> str:
    return "×".join(map(str, case["image_shape_nhwc"][:3]))


def _gradient_errors(golden: Golden, grads, wanted: dict) -> tuple[float, float]:
    """Returns the worst error of norms and of projections, each relative to the gradient's norm.

    A gradient that is zero but for rounding (a bias that a batch norm takes away again) has no
    relative error: what is below two millionths of the largest norm counts as zero, and the scale
    of a bias is at least a hundredth of its layer's weight's norm.
    """
    weights = bridge.get_weights(golden.model)
    bridge.set_weights(golden.model, weights | {"params": grads})  # to get the release's layouts
    grads = convert.to_state_dict(golden.model)
    bridge.set_weights(golden.model, weights)
    seed, norms, projections = golden.record["weight_seed"], 0.0, 0.0
    floor = 2e-6 * max(norm for norm, _ in wanted.values())
    for key, (norm, projection) in wanted.items():
        layer, _, leaf = key.rpartition(".")
        weight_norm, _ = wanted.get(f"{layer}.weight", (0, 0)) if leaf == "bias" else (0, 0)
        scale = max(norm, 1e-2 * weight_norm)
        found = np.linalg.norm(grads[key].astype(np.float64))
        if max(found, norm) < floor:
            continue
        norms = max(norms, abs(found - norm) / scale)
        error = abs(reference.projection(seed, key, grads[key]) - projection)
        projections = max(projections, error / scale)
    return norms, projections


def _distance(got: np.ndarray, want: np.ndarray) -> float:
    got, want = got.astype(np.float64), want.astype(np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def model_of(case: str) -> str:
    """Returns the registered model that a case or a golden file is of."""
    return re.split(r"_det_|_bottleneck| \(train\)", case)[0]


def main() -> int:
    return ending(_main, limited=False) or 0


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="names or shell patterns; default: all")
    parser.add_argument("--golden", type=pathlib.Path, default=GOLDEN)
    parser.add_argument("--save", type=pathlib.Path, help="JSON file for the figures")
    options = parser.parse_args()
    files = sorted(
        {
            file
            for pattern in options.models or ["*"]
            for file in options.golden.rglob(f"{pattern}.json")
            if model_of(file.stem) in list_models() and file.parent.name != "training"
        },
        key=lambda file: (file.parent, file.stat().st_size, file.name),
    )
    print("| case | images | " + " | ".join([*BARS, "seconds"]) + " | |")
    print("|---|---" + "|---" * (len(BARS) + 1) + "|---|")
    print("| bar | | " + " | ".join(f"{bar:.0e}" for bar in BARS.values()) + " | | |")
    rows = []
    for file in files:
        for row in compare(file):
            rows.append(row)
            values = [getattr(row, name) for name in BARS]
            numbers = ["" if value is None else f"{value:.1e}" for value in values]
            print(
                f"| {row.case} | {row.images} | {' | '.join(numbers)} | {row.seconds:.0f} | "
                f"{'pass' if row.passes else 'FAIL'} |",
                flush=True,
            )
    models = [name for pattern in options.models or ["*"] for name in list_models(pattern)]
    if options.save:
        old = json.loads(options.save.read_text()) if options.save.exists() else {}
        options.save.parent.mkdir(parents=True, exist_ok=True)
        options.save.write_text(json.dumps(merge(old, rows, models), indent=1) + "\n")
    for name in set(models) - {model_of(row.case) for row in rows}:
        print(
            f"{name} has no golden files in {options.golden}. Where there is official code, "
            f"python -m tests.write_golden {name} --reference=CHECKOUT writes them",
            file=sys.stderr,
        )
    if not rows and not models:
        print(f"no model or golden file matches {', '.join(options.models)}", file=sys.stderr)
        return 1
    return 0 if all(row.passes for row in rows) else 1


def merge(old: Figures, rows: list[Parity], models: list[str]) -> Figures:
    """Returns the old figures with those of this run in the place of the same models' own.

    A case says with which versions it was measured, where these are not those of the whole file.

    Args:
      old: what an earlier run saved; {} for none.
      rows: of this run.
      models: whose multiply-adds are counted again.
    """
    made = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "versions": versions()}
    measured = {model_of(row.case) for row in rows}
    kept = [case for case in old.get("cases", []) if model_of(case["case"]) not in measured]
    whole = {name: old[name] for name in made} if kept else made
    own = made if made != whole else {}
    new = [row._asdict() | {"bars": row.bars} | own for row in rows]
    counted = old.get("multiply_adds", {}) | {name: multiply_adds(name) for name in models}
    return {
        **whole,
        "bars": BARS,
        "cases": sorted(kept + new, key=lambda case: case["case"]),
        "multiply_adds": {name: counted[name] for name in list_models() if name in counted},
    }


def multiply_adds(name: str) -> int:
    """Counts the multiply-adds of one image in our program."""
    size = hybrid_flax.model_info(name).image_size
    model = bridge.abstract(lambda: hybrid_flax.create_model(name))
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return count_multiply_adds(as_function(model), bridge.get_weights(model), image)


if __name__ == "__main__":
    sys.exit(main())
