"""Loads and stores of a Hopper kernel in which every lane goes its own way.

Pallas moves blocks. What gathers needs an address of its own in each lane, so the two operations
here are written in Mosaic GPU's own terms. They are all of a kernel that tests cannot interpret:
`interpreted` runs the same programs on arrays, with XLA's gathers in their place.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

LANES = 128  # of a warpgroup, which is a program
_LAYOUT = plgpu.Layout.WG_STRIDED((LANES,), vec_size=1)
_DYNAMIC = -(2**31)  # how LLVM marks an index that is a value


class Memory:
    """Arrays in a GPU's memory, seen as runs of `count` neighbouring elements."""

    def __init__(self, refs: dict):
        self.refs = refs

    def lanes(self):
        """0 to 127, int32."""
        return plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, (LANES,), 0), _LAYOUT)

    def zeros(self):
        return plgpu.layout_cast(jnp.zeros((LANES,), jnp.float32), _LAYOUT)

    def scalar(self, name: str, index):
        """One element."""
        return self.refs[name][index]

    def load(self, name: str, index, count: int) -> list:
        """Run `index[i]` in lane i, as `count` float32 arrays of the lanes."""
        result = plgpu.ShapeDtypeStruct((LANES,), jnp.float32, layout=_LAYOUT)

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _LAYOUT), return_type=(result,) * count)
        def load(ctx, ref, index):
            run, address, bytes_ = _address(ref, index, count)
            elements = llvm.load(run, address, alignment=bytes_, invariant=True)
            if mgpu.utils.bitwidth(run.element_type) == 16:
                elements = arith.extf(ir.VectorType.get((count,), ir.F32Type.get()), elements)
            single = ir.VectorType.get((1,), ir.F32Type.get())
            elements = [vector.extract(elements, [], [i]) for i in range(count)]
            return tuple(
                mgpu.FragmentedArray(
                    _registers=np.array([vector.broadcast(single, element)], object),
                    _layout=index.layout,
                    _is_signed=None,
                )
                for element in elements
            )

        return list(load(self.refs[name], index))

    def store(self, name: str, index, values: list) -> None:
        """Writes run `index[i]` from lane i of float32 arrays. Lanes may repeat each other."""
        count = len(values)

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), _LAYOUT, *(_LAYOUT,) * count))
        def store(ctx, ref, index, *values):
            run, address, bytes_ = _address(ref, index, count)
            wide = ir.VectorType.get((count,), ir.F32Type.get())
            elements = vector.from_elements(
                wide, [vector.extract(value.registers.item(), [], [0]) for value in values]
            )
            if mgpu.utils.bitwidth(run.element_type) == 16:
                elements = arith.truncf(run, elements)
            llvm.store(elements, address, alignment=bytes_)

        store(self.refs[name], index, *values)


def _address(ref, index, count: int):
    """(type of a run, address of run `index` of this lane, bytes of a run)."""
    run = ir.VectorType.get((count,), ir.MemRefType(ref.type).element_type)
    pointer = mgpu.utils.memref_ptr(ref)
    index = vector.extract(index.registers.item(), [], [0])
    wraps = llvm.GEPNoWrapFlags.none
    address = llvm.getelementptr(pointer.type, pointer, [index], [_DYNAMIC], run, wraps)
    return run, address, count * mgpu.utils.bitwidth(run.element_type) // 8


def launch(program, count: int, inputs: dict, outputs: dict) -> dict:
    """Runs `program(memory, number)` for every number below `count`.

    A program returns what is to be stored: [(name, index of the runs, arrays of the lanes)].

    Args:
      inputs: arrays by name.
      outputs: shapes and dtypes by name; every element must be stored by some program.

    Raises:
      ValueError: an array too large for the lanes' 32-bit addresses.
    """
    for name, array in (inputs | outputs).items():
        if array.size >= 2**31:
            raise ValueError(
                f"{name} {list(array.shape)} has {array.size:,} elements: the kernel's addresses "
                'end at 2,147,483,647. Take a smaller batch per device, or implementation="xla"'
            )

    def body(*refs):
        memory = Memory(dict(zip((*inputs, *outputs), refs, strict=True)))
        for name, index, values in program(memory, lax.axis_index("block")):
            memory.store(name, index, values)

    out = plgpu.kernel(
        body,
        out_type=tuple(outputs.values()),
        grid=(count,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
    )(*inputs.values())
    return dict(zip(outputs, out, strict=True))


class _Arrays(Memory):
    def lanes(self):
        return lax.iota(jnp.int32, LANES)

    def zeros(self):
        return jnp.zeros((LANES,), jnp.float32)

    def load(self, name, index, count):
        runs = self.refs[name].reshape(-1, count)
        return list(runs.at[index].get(mode="promise_in_bounds").astype(jnp.float32).T)


def interpreted(program, count: int, inputs: dict, outputs: dict) -> dict:
    """As `launch`, on any platform."""
    stored: list = []

    def run(number):
        stored[:] = program(_Arrays(inputs), number)
        return [(index, jnp.stack(values, axis=1)) for _, index, values in stored]

    results = lax.map(run, jnp.arange(count, dtype=jnp.int32))
    out = {name: jnp.full(x.shape, jnp.nan, x.dtype) for name, x in outputs.items()}
    for (name, _, values), (index, runs) in zip(stored, results, strict=True):
        flat = out[name].reshape(-1, len(values))
        flat = flat.at[index.reshape(-1)].set(runs.reshape(-1, len(values)).astype(flat.dtype))
        out[name] = flat.reshape(outputs[name].shape)
    return out
