"""Compares our models with what the official PyTorch code gave: make parity

`tests/golden/FAMILY/NAME.json` and `.npz` hold, for weights and images that `reference.py`
rebuilds, the official logits, samples and moments of every stage, the loss, and each parameter
gradient's norm and projection. Another folder of the same form:
`python -m tests.parity --golden=DIR`.
"""

import argparse
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import convert
import hybrid_flax
from hybrid_flax import bridge
from hybrid_flax.flops import count_multiply_adds
from hybrid_flax.workdir import versions
from tests import reference

GOLDEN = pathlib.Path(__file__).parent / "golden"

# In float32 on a CPU, relative to the reference.
BARS = {"logits": 1e-4, "stages": 1e-4, "loss": 1e-4, "norms": 1e-3, "projections": 1e-3}


class Parity(NamedTuple):
    """One golden case; each number is the worst over what it covers, None where not recorded."""

    model: str
    images: str
    logits: float  # relative L2
    stages: float  # relative L2 of samples, and of mean and rms against the rms
    loss: float | None  # relative
    norms: float | None  # gradient norms, relative, over all parameters
    projections: float | None  # gradient projections, relative to the norm
    seconds: float

    @property
    def passes(self) -> bool:
        numbers = ((getattr(self, name), bar) for name, bar in BARS.items())
        return all(number is None or number <= bar for number, bar in numbers)


def compare(file: pathlib.Path) -> Iterator[Parity]:
    """Runs all cases of one golden model; also asserts that conversion round-trips to the bit."""
    golden = json.loads(file.read_text())
    arrays = np.load(file.with_suffix(".npz"))
    name, seed = golden["name"], golden["weight_seed"]
    model = bridge.abstract(lambda: hybrid_flax.create_model(name))
    shapes = golden["parameters"] | golden["float_buffers"]
    state = {key: reference.weights(seed, key, tuple(shape)) for key, shape in shapes.items()}
    convert.load_state_dict(model, state)
    exported = convert.to_state_dict(model)
    assert set(exported) == set(state) | set(golden["other_entries"]), "keys differ after export"
    assert all(np.array_equal(exported[key], state[key]) for key in state), "export is not exact"

    apply, params = bridge.as_function(model), bridge.get_params(model)
    for index, case in enumerate(golden["cases"]):
        start = time.perf_counter()
        images = jnp.asarray(reference.images(case["seed"], tuple(case["image_shape_nhwc"])))
        maps = jax.jit(lambda p, x: apply(p, x, method="intermediates"))(params, images)
        maps = {label: np.asarray(value) for label, value in maps.items()}
        stages = 0.0
        for label, want in case["stages"].items():
            got = maps[label]
            assert list(got.shape) == want["shape"], f"{label}: {got.shape}, {want['shape']}"
            rms = np.sqrt(np.mean(np.square(got, dtype=np.float64)))
            stages = max(
                stages,
                _distance(reference.samples(got), arrays[f"stage_{index}_{label}"]),
                abs(rms / want["rms"] - 1),
                abs(got.mean(dtype=np.float64) - want["mean"]) / want["rms"],
            )
        loss = norms = projections = None
        if "grads" in case:
            value, grads = jax.jit(jax.value_and_grad(lambda p, x, y: _loss(apply(p, x), y)))(
                params, images, jnp.asarray(case["labels"])
            )
            loss = abs(float(value) / case["loss"] - 1)
            norms, projections = _gradient_errors(model, grads, case["grads"], seed)
        yield Parity(
            name,
            "×".join(map(str, case["image_shape_nhwc"][:3])),
            _distance(maps["logits"], arrays[f"logits_{index}"]),
            stages,
            loss,
            norms,
            projections,
            time.perf_counter() - start,
        )


def _loss(logits, labels):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1).mean()


def _gradient_errors(model, grads, golden, seed) -> tuple[float, float]:
    bridge.set_params(model, grads)  # so that gradients get the release's names and layouts
    grads = convert.to_state_dict(model)
    norms = projections = 0.0
    for key, (norm, projection) in golden.items():
        found = np.linalg.norm(grads[key].astype(np.float64))
        norms = max(norms, abs(found / norm - 1))
        error = abs(reference.projection(seed, key, grads[key]) - projection)
        projections = max(projections, error / norm)
    return norms, projections


def _distance(got: np.ndarray, want: np.ndarray) -> float:
    got, want = got.astype(np.float64), want.astype(np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def main() -> int:
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
            if file.stem in hybrid_flax.list_models() and file.parent.name != "training"
        },
        key=lambda file: (file.parent, file.stat().st_size, file.name),
    )
    print("| model | images | " + " | ".join([*BARS, "seconds"]) + " | |")
    print("|---|---" + "|---" * (len(BARS) + 1) + "|---|")
    print("| bar | | " + " | ".join(f"{bar:.0e}" for bar in BARS.values()) + " | | |")
    rows = []
    for file in files:
        for row in compare(file):
            rows.append(row)
            values = [getattr(row, name) for name in BARS]
            numbers = ["" if value is None else f"{value:.1e}" for value in values]
            print(
                f"| {row.model} | {row.images} | {' | '.join(numbers)} | {row.seconds:.0f} | "
                f"{'pass' if row.passes else 'FAIL'} |",
                flush=True,
            )
    if options.save:
        _save(options.save, rows)
    if not rows:
        print(f"no golden files match in {options.golden}", file=sys.stderr)
    return 0 if rows and all(row.passes for row in rows) else 1


def _save(file: pathlib.Path, rows: list[Parity]):
    record = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "versions": versions()}
    record["bars"] = BARS
    record["models"] = {
        row.model: row._asdict() | {"multiply_adds": multiply_adds(row.model)} for row in rows
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1) + "\n")


def multiply_adds(name: str) -> int:
    """Of one image, counted in our program."""
    size = hybrid_flax.model_info(name).image_size
    model = bridge.abstract(lambda: hybrid_flax.create_model(name))
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    return count_multiply_adds(bridge.as_function(model), bridge.get_params(model), image)


if __name__ == "__main__":
    sys.exit(main())
