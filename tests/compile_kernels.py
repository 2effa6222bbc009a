"""Compiles the kernels for accelerators that are not here.

python -m tests.compile_kernels [--chips=v4,v5e,v5p,v6e,h200] [--models=PATTERN] [--save=FILE]

Every shape of every model at 224 pixels, and of deformable sampling also at a detector's, forward
and backward, in bfloat16, and for the TPU with the least memory also in float32. TPUs need libtpu,
the H200 jax[cuda13]: `make kernels` installs both. What compiles is not thereby fast: the figures
are the compilers' own. For a TPU they say how many bytes XLA's program moves between memory and
chip, and how many the kernel does; for the H200 the kernels' registers and spilled bytes. Where XLA
gathers, they say on both how much memory the programs need besides arguments and result.
"""

import argparse
import dataclasses
import fnmatch
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tempfile

os.environ["MOSAIC_GPU_DUMP_TO"] = tempfile.mkdtemp()  # where it leaves its kernels' code
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import hybrid_flax
from hybrid_flax.costs.targets import H200
from hybrid_flax.run.ending import ending
from hybrid_flax.versions import versions
from pallas.deformable_conv.geometry import Sampling
from tests.pallas.cases import (
    DETECTION,
    Geometry,
    argument_shapes,
    definition,
    kernels,
    model_geometries,
)

BATCH, DETECTOR_BATCH = 128, 2
TPUS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
CHIPS = (*TPUS, "h200")


def device(chip: str) -> NamedSharding:
    """One chip, as described to its compiler."""
    if chip in TPUS:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[chip])
    else:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=H200.read_text(), topology="1x1x1"
        )
    return NamedSharding(Mesh(np.array(topology.devices[:1]), ("one",)), PartitionSpec())


def compiled(function, shapes, chip: str):
    where = device(chip)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), shapes)
    platform = "tpu" if chip in TPUS else "cuda"
    return jax.jit(function).trace(*shapes).lower(lowering_platforms=(platform,)).compile()


def passes(forward, backward):
    """{name: function of the operation's arguments and the gradient of its result}"""
    return {"forward": lambda *a: forward(*a[:-1]), "backward": backward}


def compile_for_tpu(geometry: Geometry, batch: int, chip: str, against_xla: bool = False) -> dict:
    """Compiles both passes. Raises what the compiler raises."""
    module = kernels(geometry).tpu
    shapes = argument_shapes(geometry, batch)
    ours = passes(lambda *a: module.forward(geometry, *a), lambda *a: module.backward(geometry, *a))
    record = {}
    for name, function in ours.items():
        compiled(function, shapes, chip)
        record[name] = "compiled"
        if against_xla and isinstance(geometry, Sampling):
            record[name] = _memory_needed(geometry, name, function, shapes, chip)
        elif against_xla:
            record[name] = _bytes_moved(geometry, name, shapes, chip)
    return record


def _memory_needed(geometry, name: str, ours, shapes, chip: str) -> dict:
    """Besides arguments and result, of the kernel and of what XLA makes of the definition."""
    define = definition(geometry)
    theirs = passes(define, lambda *a: jax.vjp(define, *a[:-1])[1](a[-1]))[name]
    # Small last axes would be padded to whole registers: they exist only inside.
    flat = [
        jax.ShapeDtypeStruct((*shape.shape[:3], math.prod(shape.shape[3:])), shape.dtype)
        for shape in shapes
    ]

    def needed(function):
        def program(*arrays):
            pairs = zip(arrays, shapes, strict=True)
            out = function(*(array.reshape(shape.shape) for array, shape in pairs))
            return jax.tree.map(lambda x: x.reshape(*x.shape[:3], -1), out)

        try:
            memory = compiled(program, flat, chip).memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            if found := re.search(
                r"total memory required for HLO temporaries \((.*?)G", str(error)
            ):
                return round(float(found[1]) * 2**30 / 1e6)
            raise
        return round(memory.temp_size_in_bytes / 1e6)

    return {"temporary_megabytes": needed(ours), "temporary_megabytes_xla": needed(theirs)}


def _bytes_moved(geometry, name: str, shapes, chip: str) -> dict:
    """Of the kernel, which moves every map once, and of what XLA makes of the definition."""
    qkv, *others = shapes
    packed = jax.ShapeDtypeStruct((*qkv.shape[:3], math.prod(qkv.shape[3:])), qkv.dtype)
    define = definition(geometry)

    def forward(packed, *rest):  # heads only inside, where XLA chooses their layout
        out = define(packed.reshape(qkv.shape), *rest)
        return out.reshape(*out.shape[:3], -1)

    def backward(packed, *rest):
        *rest, out_grad = rest
        out_grad = out_grad.reshape(*out_grad.shape[:3], -1)
        return jax.vjp(forward, packed, *rest)[1](out_grad)

    function = passes(forward, backward)[name]
    counted = compiled(function, (packed, *others), chip).cost_analysis()["bytes accessed"]
    maps = [x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes) if x.ndim >= 5]
    moved = sum(maps) if name == "forward" else 2 * sum(maps) - maps[-1]
    return {"megabytes": round(moved / 1e6, 1), "megabytes_xla": round(counted / 1e6, 1)}


def compile_for_gpu(geometry: Geometry, batch: int) -> dict:
    """Compiles both passes, or says why there is no kernel."""
    module = kernels(geometry).gpu
    if refusal := module.refusal(geometry):
        return {"refused": refusal}
    shapes = argument_shapes(geometry, batch)
    ours = passes(lambda *a: module.forward(geometry, *a), lambda *a: module.backward(geometry, *a))
    record = {}
    for name, function in ours.items():
        dump = pathlib.Path(os.environ["MOSAIC_GPU_DUMP_TO"])
        for path in dump.iterdir():
            path.unlink()
        compiled(function, shapes, "h200")
        codes = sorted(dump.glob("*.ptx"), key=os.path.getmtime)
        ptx = [path for path in codes if "mosaic_gpu_kernel" in path.read_text()]
        record[name] = {"kernels": [_assembled(path) for path in ptx]}
        if isinstance(geometry, Sampling):
            record[name] |= _memory_needed(geometry, name, function, shapes, "h200")
    return record


def _assembled(path: pathlib.Path) -> dict:
    """What NVIDIA's assembler makes of a kernel."""
    run = subprocess.run(
        [_ptxas(), "-v", "-arch=sm_90a", path, "-o", "/dev/null"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {
        "registers": int(re.search(r"Used (\d+) registers", run.stderr)[1]),
        "spilled_bytes": int(re.search(r"(\d+) bytes spill stores", run.stderr)[1]),
    }


def _ptxas() -> str:
    import nvidia

    return str(next(pathlib.Path(next(iter(nvidia.__path__))).glob("**/bin/ptxas")))


def main() -> int:
    return ending(_main, limited=False) or 0


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", default=",".join(CHIPS))
    parser.add_argument("--models", default="*", help="shell pattern of model names")
    parser.add_argument("--save", type=pathlib.Path, help="JSON file for the figures")
    options = parser.parse_args()
    rows, failures = [], 0
    cases = [(geometry, BATCH) for geometry in model_geometries(options.models)]
    for name in fnmatch.filter(hybrid_flax.list_models(options.models), "unified_internimage_*"):
        cases += [(geometry, DETECTOR_BATCH) for geometry in model_geometries(name, DETECTION)]
    for geometry, batch in cases:
        for chip in options.chips.split(","):
            for dtype in ("bfloat16", "float32") if chip == "v4" else ("bfloat16",):
                shape = dataclasses.replace(geometry, dtype=dtype)
                try:
                    result = compile_on(shape, batch, chip)
                except Exception as error:
                    failures += 1
                    result = {"failed": str(error).splitlines()[0][:300]}
                rows.append({"chip": chip, "batch": batch, **dataclasses.asdict(shape), **result})
                print(chip, shape, result, flush=True)
    print(f"{len(cases)} shapes, {len(rows)} cases, {failures} failures")
    if options.save:
        lines = ",\n  ".join(json.dumps(row) for row in rows)
        head = f'{{"versions": {json.dumps(versions())},\n "rows": [\n  '
        options.save.write_text(head + lines + "\n ]}\n")
    return 1 if failures else 0


def compile_on(geometry: Geometry, batch: int, chip: str) -> dict:
    """One case; what a chip is not given by `auto` is not compiled for it."""
    if chip == "h200":
        return compile_for_gpu(geometry, batch)
    if refusal := kernels(geometry).tpu.refusal(geometry, every_core=True):
        return {"refused": refusal}
    against_xla = chip == "v5e" and geometry.dtype == "bfloat16"
    return compile_for_tpu(geometry, batch, chip, against_xla)


if __name__ == "__main__":
    sys.exit(main())
