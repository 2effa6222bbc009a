"""Arguments that every layer takes, to be handed on as `**options`."""

from typing import TypedDict

from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike


class Options(TypedDict):
    """The dtype of the computation, and where initial values come from."""

    dtype: DTypeLike
    rngs: nnx.Rngs


class KernelOptions(Options):
    """Those, and the initial values of a layer's kernel."""

    kernel_init: Initializer


class BiasedOptions(KernelOptions):
    """Those, and whether the layer has a bias."""

    use_bias: bool
