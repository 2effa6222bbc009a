"""What every layer is told when it is made, to be handed on as `**options`."""

from typing import TypedDict

from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike


class Options(TypedDict):
    """The dtype of the computation, and where initial values come from."""

    dtype: DTypeLike
    rngs: nnx.Rngs


class KernelOptions(Options):
    """How a layer's kernel starts, besides."""

    kernel_init: Initializer


class BiasedOptions(KernelOptions):
    """Whether the layer has a bias, besides."""

    use_bias: bool
