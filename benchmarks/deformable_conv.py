"""Deformable sampling, for every stage of the base InternImage: ours, XLA's, PyTorch's.

python -m benchmarks.deformable_conv [--batch=128] [--shapes=SUBSTRING] [--save=FILE]

Times are as `benchmarks/operation.py` takes them. "forward + backward" has the gradients of value,
offsets and mask. Offsets are normal with a standard deviation of 1 pixel. The floor is what a
perfect kernel would take that moves every array once and, on GPUs, gathers its pixels through L1.
"""

import functools
import math
import sys

import jax

from benchmarks.deformable_conv_torch import sampling
from benchmarks.operation import Benchmark, Work, command, normal
from pallas.deformable_conv import deformable_sampling
from pallas.deformable_conv.choice import KERNELS
from pallas.deformable_conv.geometry import Sampling

GROUP_DIM = 16


def shapes(dtype: str) -> dict[str, Sampling]:
    """Every stage at 224 pixels; 112 channels in the first."""
    return {
        f"unified_internimage_base s{stage + 1}": Sampling(
            *(side, side, side, side), 7 * 2**stage, GROUP_DIM, kernel_size=3, dtype=dtype
        )
        for stage, side in enumerate((56, 28, 14, 7))
    }


def argument_shapes(geometry: Sampling, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the operation's arguments by name, and of `out_grad`."""
    places = (batch, geometry.out_height, geometry.out_width, geometry.groups)
    pixels = (batch, geometry.height, geometry.width, geometry.groups)
    shapes = {
        "value": ((*pixels, geometry.channels), geometry.dtype),
        "offsets": ((*places, geometry.points, 2), geometry.dtype),
        "mask": ((*places, geometry.points), "float32"),
        "out_grad": ((*places, geometry.channels), geometry.dtype),
    }
    return {name: jax.ShapeDtypeStruct(*shape) for name, shape in shapes.items()}


def random_arguments(geometry: Sampling, batch: int) -> dict[str, jax.Array]:
    """Normal numbers, those of the mask after a softmax over the points."""
    arguments = normal(argument_shapes(geometry, batch))
    return arguments | {"mask": jax.nn.softmax(arguments["mask"])}


def operation(geometry: Sampling, implementation: str):
    """The operation as a function of `argument_shapes` without `out_grad`."""
    return functools.partial(
        deformable_sampling, kernel_size=geometry.kernel_size, implementation=implementation
    )


def work(geometry: Sampling, batch: int) -> tuple[Work, Work]:
    """The work of forward and backward.

    Forward reads value, offsets and mask and writes the result. Backward reads these and the
    result's gradient and writes three gradients. Both gather the four pixels around every point;
    what backward adds up for the gradient of value is not counted.
    """
    sizes = {
        name: math.prod(shape.shape) * shape.dtype.itemsize
        for name, shape in argument_shapes(geometry, batch).items()
    }
    result = sizes.pop("out_grad")
    given, gathered = sum(sizes.values()), 4 * geometry.points * result
    return Work(given + result, gathered=gathered), Work(2 * given + result, gathered=gathered)


BENCHMARK = Benchmark(
    description=__doc__.splitlines()[0],
    shapes=shapes,
    random_arguments=random_arguments,
    operation=operation,
    torch_operation=sampling,
    work=work,
    kernels=lambda geometry: KERNELS,
    conditions={
        "inputs": {
            "offsets": "normal, standard deviation 1 pixel",
            "mask": "softmax over the points of normal numbers",
        }
    },
)
main = functools.partial(command, BENCHMARK)


if __name__ == "__main__":
    sys.exit(main())
