"""Fine-tunes any model on a set of thousands of images rather than a million.

python -m hybrid_flax.main --workdir=runs/pets \
  --config=configs/finetune.py:model=gcvit_b,dataset=image_folder,path=PETS

Arguments after the colon, name=value with commas between; any field can be changed beside them
(--config.optimizer.learning_rate=1e-4):

  model       any model's name
  checkpoint  "pretrained": the released weights, downloaded; a released file; the folder of a run
              or of `python -m convert`; "none": start from nothing
  dataset     as `dataset.name`, and `path` as `dataset.path`
  classes     0: as many as the dataset has
  image_size  0: the model's own
  batch_size, epochs
  probe       train the classifier alone, on features that stay as they are

None of this is from a paper. The layer-wise decay is BEiT's idea (arXiv:2106.08254), the numbers
are what is usual for models of this size; the weights are an average that warms up, because a short
run has few steps.
"""

import importlib

from hybrid_flax.configs.arguments import parse_arguments
from hybrid_flax.models import registry


def get_config(arguments: str = ""):
    given = parse_arguments(
        arguments,
        {
            "model": "gcvit_xxt",
            "checkpoint": "pretrained",
            "dataset": "digits",
            "path": "",
            "classes": 0,
            "image_size": 0,
            "batch_size": 64,
            "epochs": 30,
            "probe": False,
        },
    )
    info = registry.model_info(given["model"])  # names the models there are, if it is none
    config = importlib.import_module(f"hybrid_flax.configs.{given['model']}").get_config()
    config.init_from = "" if given["checkpoint"] == "none" else given["checkpoint"]
    config.dataset.name = given["dataset"]
    config.dataset.path = given["path"]
    config.dataset.decode = "fast"  # photos of small sets are often a camera's
    config.model.num_classes = given["classes"]
    config.model.image_size = given["image_size"] or info.image_size
    config.batch_size = given["batch_size"]
    config.epochs = given["epochs"]
    config.checkpoint.every_steps = 200
    config.log_every_steps = 10
    config.eval.batch_size = 64

    config.model.batch_norm_group = config.augment.mix_group = 0  # one batch, whatever its size
    config.augment.repeats = 1
    config.augment.crop_scale = (0.35, 1.0)
    config.augment.auto_augment = "rand-m5-mstd0.5-inc1"
    config.augment.mixup_alpha = 0.0
    config.augment.cutmix_alpha = 0.0
    config.augment.erasing_probability = 0.1

    optimizer, schedule = config.optimizer, config.schedule
    optimizer.name = "adamw"  # whatever the model was trained with; what decays stays as it was
    optimizer.learning_rate = 2e-4
    optimizer.learning_rate_for_batch = 64
    optimizer.weight_decay = 0.05
    optimizer.layer_decay = 0.8
    optimizer.clip_norm = 1.0
    config.model.drop_path = 0.1
    config.ema_decay = 0.999
    config.ema_warmup = True
    schedule.warmup_epochs = min(3.0, given["epochs"] / 10)
    schedule.warmup_learning_rate = 0.0
    schedule.min_learning_rate = 1e-6
    schedule.decay_epochs = float(given["epochs"])
    schedule.decay_from_start = schedule.warmup_reaches_peak = schedule.each_epoch = False
    schedule.lag_epochs = 0
    if given["dataset"] == "digits":  # small, centred, and neither mirrored nor turned
        config.model.dtype = "float32"  # CPUs compute bfloat16 slowly
        config.dataset.num_workers = 0
        config.augment.crop_scale = (0.6, 1.0)
        config.augment.flip = 0.0
        config.augment.auto_augment = ""
        config.augment.colour_jitter = (0.0,) * 4
        config.eval.crop_fraction = 1.0
    if given["probe"]:
        _probe(config)
    return config


def _probe(config):
    """A linear classifier on frozen features: nothing to hold back, so no decay and no average."""
    classifier = registry.family_of(config.model.name).model.structure.classifier
    config.optimizer.freeze = (rf"^(?!{classifier})",)  # all but the classifier
    config.model.eval_mode = True
    config.model.drop_path = 0.0
    config.optimizer.learning_rate = 1e-3
    config.optimizer.layer_decay = 1.0
    config.optimizer.weight_decay = 0.0
    config.optimizer.decay_also = config.optimizer.decay_never = ()
    config.ema_decay = 0.0
    config.loss.label_smoothing = 0.0
    config.augment.auto_augment = ""
    config.augment.colour_jitter = (0.0,) * 4
    config.augment.erasing_probability = 0.0
