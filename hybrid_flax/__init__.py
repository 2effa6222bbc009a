"""Hybrid convolution/attention vision backbones in JAX: train, port and fine-tune.

import hybrid_flax
model = hybrid_flax.create_model("gcvit_b")
logits = nnx.jit(model)(images)  # [B, 224, 224, 3], normalised → [B, 1000]
"""

from __future__ import annotations

import itertools
import signal
import sys
import typing

__version__ = "0.1.0"

# `python -m hybrid_flax.…`, `convert`: until `cli.ending` listens, Ctrl-C ends it, and without a
# traceback.
if any(
    option == "-m" and module.partition(".")[0] in ("hybrid_flax", "convert")
    for option, module in itertools.pairwise(sys.orig_argv)
):
    signal.signal(signal.SIGINT, signal.SIG_DFL)

if typing.TYPE_CHECKING:
    from flax import nnx
    from jax.typing import DTypeLike

    from hybrid_flax.models.backbone import Backbone

# Loaded on first use, so that processes which only read images import neither JAX nor Flax.
_FROM_REGISTRY = ("list_models", "model_info", "model_variant")

__all__ = ["create_model", *_FROM_REGISTRY]


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    image_size: int | tuple[int, int] | None = None,
    dtype: DTypeLike = "float32",
    implementation: str = "auto",
    rngs: nnx.Rngs | None = None,
    pretrained: bool = False,
    **overrides,
) -> Backbone:
    """Builds a model with float32 parameters, freshly initialised or as released.

    Args:
      name: one of `list_models()`.
      num_classes: width of the classifier; 0: none, the model gives features [B, C].
      image_size: height and width in pixels, or a pair (height, width) where the family is not
        built for squares; default: the released model's own.
      dtype: of the computation. Parameters, norms, softmax and logits stay float32.
      implementation: of windowed attention and deformable sampling: "auto", as `pallas/*/choice.py`
        says; "pallas", the kernels; or "xla".
      rngs: where the initial values come from; default `nnx.Rngs(0)`.
      pretrained: whether to download the released weights and load them. Needs PyTorch for files
        in its format. A classifier for other than the released number of classes stays fresh.
      **overrides: fields of the family's `Variant`: `drop_path=0.1`, `depths=(1, 1, 2, 1)`.

    Returns:
      A module: `model(images)` gives logits [B, num_classes] for normalised images [B, H, W, 3].

    Raises:
      InputError: unknown name or override, a size the family cannot be built for, or no released
        weights to be had.
    """
    from hybrid_flax.models import registry

    model = registry.create_model(
        name,
        num_classes=num_classes,
        image_size=image_size,
        dtype=dtype,
        implementation=implementation,
        rngs=rngs,
        **overrides,
    )
    if not isinstance(pretrained, bool):
        from hybrid_flax.errors import InputError

        raise InputError(
            f"pretrained={pretrained!r}: expected True or False. Weights of a file: "
            "convert.load_state_dict(model, convert.load_checkpoint(FILE))"
        )
    if pretrained:
        from convert.pretrained import load_pretrained

        load_pretrained(name, model)
    return model


def __getattr__(name: str):
    if name in _FROM_REGISTRY:
        from hybrid_flax.models import registry

        return getattr(registry, name)
    raise AttributeError(f"module 'hybrid_flax' has no attribute {name!r}")
