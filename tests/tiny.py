"""A training run small enough for tests, with every random part of the recipe switched on.

It is a config file: python -m hybrid_flax.main --config=tests/tiny.py --workdir=DIR

As a program it trains in a process of its own that can be killed at a chosen moment:
python -m tests.tiny WORKDIR [--kill-at=STEP] [--kill-in=save|evaluate] [--order=FILE]
"""

import argparse
import functools
import os
import signal
import sys

import ml_collections

import hybrid_flax.train
from configs import quickstart
from hybrid_flax.data import feed
from hybrid_flax.run import compiling
from hybrid_flax.run.checkpoints import Checkpoints
from hybrid_flax.settings import Settings, from_config


def get_config(**overrides) -> ml_collections.ConfigDict:
    """Ten steps over two epochs of the digits, with the model that compiles fastest.

    Overrides by dotted name with "." as "__".
    """
    config = quickstart.get_config()
    config.model.name = "unified_convnext_micro"
    with config.unlocked():
        config.model.overrides = {"dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1)}
    config.model.image_size = 32
    config.model.drop_path = 0.2
    config.batch_size = 256
    config.epochs = 2
    config.schedule.decay_epochs = 2.0
    config.schedule.warmup_epochs = 0.5
    config.augment.flip = 0.5
    config.augment.auto_augment = "rand-m9-mstd0.5-inc1"
    config.augment.interpolation = "random"
    config.augment.vertical_flip = 0.5
    config.augment.repeats = 3
    config.augment.mix_group = 4
    config.augment.mix_probability = 0.8
    config.augment.mixup_alpha = 0.8
    config.augment.cutmix_alpha = 1.0
    config.augment.erasing_probability = 0.25
    config.eval.every_epochs = 1
    config.checkpoint.every_steps = 3
    config.log_every_steps = 2
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in overrides.items()}
    )
    return config


def settings(**overrides) -> Settings:
    """The same, checked."""
    return from_config(get_config(**overrides))


def gcvit(**overrides) -> ml_collections.ConfigDict:
    """The same for a small GC ViT, which has windows, queries and no batch norms."""
    config = get_config(**overrides)
    config.model.name = "gcvit_xxt"
    with config.unlocked():
        config.model.overrides = {"dim": 32, "depths": (1, 2, 1, 1)}
    return config


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir")
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--kill-in", choices=["save", "evaluate"])
    parser.add_argument("--order", help="file for one line per batch: its step and its images")
    options = parser.parse_args()
    train = hybrid_flax.train

    def kill(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def record(original):
        @functools.wraps(original)
        def batches(*args, start_step, **kwargs):
            iterator = original(*args, start_step=start_step, **kwargs)

            class Recorded:
                step = start_step

                def __iter__(self):
                    return self

                def __next__(self):
                    batch = next(iterator)
                    with open(options.order, "a") as file:
                        print(self.step, *batch["index"], file=file)
                    self.step += 1
                    return batch

                close = iterator.close

            return Recorded()

        return batches

    def count_down(call):
        def counted(self, state, batch):
            if "step" in state and int(state["step"]) == options.kill_at:  # it trains
                kill()
            return call(self, state, batch)

        return counted

    if options.order:
        feed.train_batches = record(feed.train_batches)
    if options.kill_at is not None:
        compiling.CompiledOnce.__call__ = count_down(compiling.CompiledOnce.__call__)
    if options.kill_in == "evaluate":
        train.evaluate = kill
    if options.kill_in == "save":
        save = Checkpoints.save

        def save_and_die(*args):
            save(*args)
            kill()

        Checkpoints.save = save_and_die
    return train.train(get_config(), options.workdir)


if __name__ == "__main__":
    sys.exit(main())
