"""What mixing, normalising and erasing on the device cost of a whole training step of GC ViT-T.

python -m benchmarks.device_augmentation [--batch_size=N] [--dtype=float32] [--save=FILE]

Both run on the same batch, in turns: the step's own `augmented_batch` alone, and the training step
that has it inside. Alone it writes the augmented images to memory, which the step may do without.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from configs import gcvit_t
from hybrid_flax.build import checked, training_program
from hybrid_flax.costs import records, timing
from hybrid_flax.distributed.batch import batch_sharded, to_devices
from hybrid_flax.distributed.mesh import make_mesh, on_mesh, replicated
from hybrid_flax.run.ending import ending
from hybrid_flax.settings import Settings
from hybrid_flax.start import initial_weights
from hybrid_flax.training.losses import smoothed_one_hot
from hybrid_flax.training.step import augmented_batch

STEPS_PER_EPOCH = 312  # of ImageNet at 4096 images; any number takes the same time


def subjects(config: Settings) -> dict[str, Callable]:
    """Makes {name: what builds it}, for `timing.compare`."""
    mesh = make_mesh(jax.devices()[:1])
    rng = np.random.default_rng(0)
    side = config.model.image_size
    shape = (config.batch_size, side, side, 3)
    batch = to_devices(
        {
            "image": rng.integers(0, 256, shape, dtype=np.uint8),
            "label": rng.integers(0, config.model.num_classes, config.batch_size, dtype=np.int32),
        },
        mesh,
    )

    def augmentation():
        @on_mesh(mesh)
        def augment(batch, step):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), step))
            targets = smoothed_one_hot(
                batch["label"], config.model.num_classes, config.loss.label_smoothing
            )
            return augmented_batch(
                tuple(keys), batch["image"], targets, step, config.augment, config.dataset, None
            )

        compiled = jax.jit(augment, in_shardings=(batch_sharded(mesh), replicated(mesh)))
        step = jnp.zeros((), jnp.int32)
        return lambda: jax.block_until_ready(compiled(batch, step))

    def training_step():
        program = training_program(config, mesh, STEPS_PER_EPOCH)
        begin = jax.jit(program.begin, out_shardings=replicated(mesh))
        state = begin(initial_weights(config, program.fresh, mesh))

        def run():
            nonlocal state  # consumed by every step
            state, metrics = program.train_step(state, batch)
            jax.block_until_ready((state, metrics))

        return run

    return {"augmentation": augmentation, "training step": training_step}


def main(arguments: list[str] | None = None) -> int:
    return ending(lambda: _main(arguments), limited=False) or 0


def _main(arguments: list[str] | None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=records.positive, default=128)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: the config's")
    parser.add_argument("--turns", type=records.positive, default=10)
    parser.add_argument("--save", type=pathlib.Path, help="JSON file for the figures")
    options = parser.parse_args(arguments)
    config = gcvit_t.get_config()
    config.batch_size = options.batch_size
    config.model.num_classes = 1000
    if options.dtype:
        config.model.dtype = options.dtype
    records.check_file("--save", options.save)
    return measure(checked(config), options.turns, options.save)


def measure(config: Settings, turns: int, file: pathlib.Path | None) -> int:
    """Compares, prints the result, and saves it if there is a file; the exit status."""
    compared = timing.compare(subjects(config), turns=turns)
    for name, why in compared.failed.items():
        print(f"{name}: {why}", file=sys.stderr)
    if compared.failed:
        return 1
    milliseconds = {name: round(1e3 * seconds, 3) for name, seconds in compared.seconds.items()}
    share = compared.seconds["augmentation"] / compared.seconds["training step"]
    print(
        f"{config.model.name}, {config.batch_size} images of {config.model.image_size} pixels, "
        f"{config.model.dtype}, on {jax.devices()[0].device_kind}"
    )
    print("   ".join(f"{name} {time} ms" for name, time in milliseconds.items()))
    print(f"augmentation takes {share:.2%} of the step")
    if file:
        record = {
            **records.record(),
            "model": config.model.name,
            "batch_size": config.batch_size,
            "image_size": config.model.image_size,
            "dtype": config.model.dtype,
            "turns": turns,
            "median_milliseconds": milliseconds,
            "share_of_the_step": round(share, 5),
        }
        records.save(file, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
