"""One of our models as `hybrid_flax.benchmark` times it: its inference and its training step."""

import collections
import functools
from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hybrid_flax.costs import chips
from hybrid_flax.costs.flops import count_multiply_adds
from hybrid_flax.distributed.batch import to_devices
from hybrid_flax.distributed.mesh import make_mesh, replicated
from hybrid_flax.models import registry
from hybrid_flax.scan_choice import scans
from hybrid_flax.settings import Augment, Loss, Model, Optimizer, Settings
from hybrid_flax.training.optimizers import make_optimizer
from hybrid_flax.training.step import make_train_step, new_state
from hybrid_flax.weights import bridge
from hybrid_flax.weights.functions import as_function, as_training_function
from pallas.deformable_conv.geometry import Sampling
from pallas.dispatch import Choice, recorded
from pallas.halo_attention.geometry import Halo
from pallas.window_attention.geometry import Windows

CLASSES = 1000
SMOOTHING, WEIGHT_DECAY, LEARNING_RATE = 0.1, 0.05, 1e-4  # ours and theirs


class Subject:
    """One of `registry.list_models()`, freshly initialised.

    Args:
      label: what to call it in the table.
      scan_blocks: whether equal blocks run as a loop: `settings.Model.scan_blocks`.
      overrides: fields of its variant.

    Raises:
      InputError: unknown model or field, or a size that it cannot be built for.
    """

    def __init__(
        self,
        label: str,
        name: str,
        *,
        image_size: int | None,
        dtype: str,
        scan_blocks: str = "auto",
        **overrides,
    ):
        self.label, self._name, self._scan_blocks = label, name, scan_blocks
        self.dtype = jnp.dtype(dtype)
        self.side = image_size or registry.model_info(name).image_size
        self._create = functools.partial(
            registry.create_model,
            name,
            num_classes=CLASSES,
            rngs=None,
            image_size=self.side,
            dtype=self.dtype,
            **overrides,
        )
        self._model = bridge.abstract(self._create)
        self._weights = bridge.get_weights(self._model)  # shapes

    def settings(self, batch: int) -> Settings:
        """Gives a plain recipe: no mixing, no erasing, no clipping, no average."""
        return Settings(
            seed=0,
            batch_size=batch,
            ema_decay=0.0,
            model=Model(
                name=self._name,
                num_classes=CLASSES,
                image_size=self.side,
                drop_path=0.0,
                scan_blocks=self._scan_blocks,
            ),
            augment=Augment(mixup_alpha=0.0, cutmix_alpha=0.0, erasing_probability=0.0),
            loss=Loss(label_smoothing=SMOOTHING),
            optimizer=Optimizer(
                learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, clip_norm=0.0
            ),
        )

    def parameters(self) -> int:
        """Counts the numbers that are trained."""
        return sum(leaf.size for leaf in jax.tree.leaves(self._weights["params"]))

    def multiply_adds(self) -> int:
        """Counts multiply-adds of one image in the program."""
        apply = as_function(self._model)
        return count_multiply_adds(apply, self._weights, self._images(1))

    def operations(self) -> list[dict[str, Any]]:
        """Lists each shape of an operation of `pallas/`: how often, what runs it here, and why.

        Empty for models without.
        """
        with recorded() as calls:
            jax.eval_shape(as_function(self._model), self._weights, self._images(1))
        here = chips.platform_name()
        other = Choice(None, f"there is no kernel for platform {here}")
        counts = collections.Counter(
            (geometry, choices.get(here, other)) for geometry, choices in calls
        )
        return [
            {"shape": describe(geometry), "count": count, **choice._asdict()}
            for (geometry, choice), count in counts.items()
        ]

    def builders(self, batch: int, pass_: str, repeats: int, memory: dict[str, int]):
        """Makes what `timing.compare` builds each subject with, by its name.

        Args:
          pass_: "inference" or "training".
          memory: where building notes how many bytes of the device a subject takes.
        """
        make = self._training if pass_ == "training" else self._inference

        def build():
            program, run = make(batch, repeats)
            sizes = program.memory_analysis()
            if sizes:  # donated arguments are counted among the results, too
                taken = sizes.argument_size_in_bytes + sizes.output_size_in_bytes
                taken += sizes.temp_size_in_bytes - sizes.alias_size_in_bytes
                memory[self.label] = taken
            return run

        return {self.label: build}

    def _images(self, batch: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, self.side, self.side, 3), self.dtype)

    def _inference(self, batch: int, repeats: int):
        weights = jax.jit(lambda: bridge.get_weights(self._create()))()
        images = jax.random.normal(jax.random.key(0), self._images(batch).shape, self.dtype)
        mesh = make_mesh(jax.devices()[:1])
        apply = as_function(self._model, scan=scans(self.settings(batch).model, mesh))
        program = jax.jit(apply).lower(weights, images).compile()

        def run():
            for _ in range(repeats):
                logits = program(weights, images)
            jax.block_until_ready(logits)

        return program, run

    def _training(self, batch: int, repeats: int):
        mesh = make_mesh(jax.devices()[:1])
        settings, schedule = self.settings(batch), optax.constant_schedule(LEARNING_RATE)
        apply = as_training_function(self._model, scan=scans(settings.model, mesh))
        optimizer = make_optimizer(settings.optimizer, schedule, self._model.structure)
        step = make_train_step(apply, optimizer, schedule, settings, mesh)

        def begin():
            return new_state(bridge.get_weights(self._create()), optimizer, settings.ema_decay)

        held = [jax.jit(begin, out_shardings=replicated(mesh))()]
        rng = np.random.default_rng(0)
        images = rng.integers(256, size=self._images(batch).shape, dtype=np.uint8)
        labels = rng.integers(CLASSES, size=batch, dtype=np.int32)
        data = to_devices({"image": images, "label": labels}, mesh)
        program = step.lower(held[0], data).compile()

        def run():
            for _ in range(repeats):
                held[0], metrics = program(held[0], data)
            jax.block_until_ready(metrics)

        return program, run


def describe(geometry: Hashable) -> str:
    """Says the shape of an operation in words.

    Raises:
      TypeError: a geometry of none of the operations in `pallas/`.
    """
    if not isinstance(geometry, Windows | Halo | Sampling):
        raise TypeError(f"{geometry!r} is no geometry of an operation in pallas/")
    text, extras = f"{geometry.height}×{geometry.width}, ", {}
    if isinstance(geometry, Sampling):
        text += f"{geometry.groups} groups of {geometry.channels}, {geometry.points} movable points"
        dilations = "/".join(map(str, geometry.dilations))
        extras = {
            f"stride {geometry.stride}": geometry.stride > 1,
            f"dilated by {dilations}": max(geometry.dilations) > 1,
            "without centre": geometry.remove_center,
        }
    elif isinstance(geometry, Halo):
        queries, keys = geometry.block, geometry.window
        text += f"{geometry.heads} heads of {geometry.dim}, "
        text += f"{queries}×{queries} queries with {keys}×{keys} keys"
    else:
        text += f"{geometry.heads} heads of {geometry.dim}, "
        text += f"windows {geometry.window[0]}×{geometry.window[1]}"
        extras = {
            f"shifted by {geometry.shift[0]}": any(geometry.shift),
            "bias": geometry.has_bias,
            "shared query": geometry.shared_query,
            "local convolution": geometry.has_local,
        }
    return ", ".join([text, *(extra for extra, there in extras.items() if there)])
