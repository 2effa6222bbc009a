"""A small GC ViT on scikit-learn's handwritten digits: minutes on a laptop CPU, no download.

Row "GC ViT, XXT to T2" of docs/recipes.md with the changes below, which are ours.

python -m hybrid_flax.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

from hybrid_flax.configs import recipes


def get_config():
    config = recipes.gcvit("gcvit_xxt", batch_size=64, learning_rate=2e-3)
    with config.unlocked():
        config.model.overrides = {"dim": 32, "depths": (2, 2, 2, 2)}
    config.epochs = 15
    config.model.image_size = 64
    config.model.dtype = "float32"  # CPUs compute bfloat16 slowly
    config.model.drop_path = 0.1
    config.dataset.name = "digits"
    config.dataset.num_workers = 0

    # Digits are small, centred and not symmetric, and the run is short: only gentle crops.
    config.augment.crop_scale = (0.6, 1.0)
    config.augment.interpolation = "bicubic"
    config.augment.flip = 0.0
    config.augment.auto_augment = ""
    config.augment.colour_jitter = (0.0, 0.0, 0.0, 0.0)
    config.augment.mixup_alpha = 0.0
    config.augment.cutmix_alpha = 0.0
    config.augment.mix_group = 0
    config.augment.erasing_probability = 0.0
    config.eval.crop_fraction = 1.0

    config.schedule.warmup_epochs = 2
    config.schedule.decay_epochs = 15
    config.schedule.decay_from_start = False
    config.ema_decay = 0.99  # the published 0.9998 averages over more steps than this run has
    config.eval.batch_size = 120
    config.eval.every_epochs = 5
    config.checkpoint.every_steps = 50
    config.log_every_steps = 10
    return config
