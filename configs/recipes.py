"""One training recipe per paper; the model configs beside this file choose from them."""

from ml_collections import ConfigDict

import hybrid_flax


def gcvit(name: str, *, batch_size: int, learning_rate: float = 5e-3) -> ConfigDict:
    """GC ViT on ImageNet-1k (arXiv:2206.09959), as the authors' configs and code train it.

    Where their sources disagree or are silent:
    - The batch is given per GPU (128 for XXT to T2, 32 from S up). A maintainer says that 32 GPUs
      were used, so 4096 and 1024 images. The paper as quoted there says 128 in all with 1e-3.
    - The same learning rate of 5e-3 is given for both batch sizes, without a scaling rule. With
      another batch size, set `--config.optimizer.learning_rate` yourself.
    - "310 epochs" runs 320: the cosine reaches its minimum after 310, ten more follow.
    - Training used float16 with loss scaling; bfloat16 here needs no scaling.
    - Evaluation during their training cut 0.875 of the image for all models; here every model is
      evaluated as its release was.
    - `drop_path` is the models' own rate: the authors' command-line flag for it was never read.
    """
    info = hybrid_flax.model_info(name)
    crop = info.eval_transform
    config = ConfigDict()
    config.seed = 42
    config.batch_size = batch_size  # over all devices and accumulation steps
    config.accumulation_steps = 1
    config.epochs = 320
    config.init_from = ""  # folder of a converted checkpoint or of another run, to fine-tune from

    config.model = model = ConfigDict()
    model.name = name
    model.num_classes = 0  # 0: as many as the dataset has
    model.image_size = info.image_size
    model.dtype = "bfloat16"  # of the computation; parameters and optimizer are float32
    model.drop_path = hybrid_flax.model_variant(name).drop_path
    model.overrides = ConfigDict()  # other fields of the family's Variant

    config.dataset = dataset = ConfigDict()
    dataset.name = "imagenet2012"  # a TFDS name, "image_folder" or "digits"
    dataset.path = ""
    dataset.mean = crop.mean
    dataset.std = crop.std
    dataset.num_workers = 8  # processes that prepare batches; 0: threads of this one
    dataset.on_unreadable = "error"  # or "skip": leave the image out, and say so

    config.augment = augment = ConfigDict()
    augment.crop_scale = (0.08, 1.0)
    augment.crop_ratio = (3 / 4, 4 / 3)
    augment.interpolation = "random"  # bilinear or bicubic
    augment.flip = 0.5
    augment.rand_augment = "rand-m9-mstd0.5-inc1"
    augment.mixup_alpha = 0.8
    augment.cutmix_alpha = 1.0
    augment.cutmix_probability = 0.5
    augment.erasing_probability = 0.25

    config.loss = ConfigDict({"label_smoothing": 0.1})

    config.optimizer = optimizer = ConfigDict()
    optimizer.learning_rate = learning_rate
    optimizer.b1 = 0.9
    optimizer.b2 = 0.999
    optimizer.eps = 1e-8
    optimizer.weight_decay = 0.05
    optimizer.clip_norm = 5.0  # 0: no clipping
    config.ema_decay = 0.9998  # 0: no average

    config.schedule = schedule = ConfigDict()
    schedule.warmup_epochs = 20.0
    schedule.warmup_learning_rate = 1e-6
    schedule.min_learning_rate = 5e-6
    schedule.cosine_epochs = 310.0
    schedule.cosine_from_start = True

    config.eval = evaluation = ConfigDict()
    evaluation.crop_fraction = crop.crop_fraction
    evaluation.crop_mode = crop.crop_mode
    evaluation.interpolation = crop.interpolation
    evaluation.batch_size = 256
    evaluation.every_epochs = 1

    config.checkpoint = ConfigDict({"every_steps": 500, "keep": 3})
    config.log_every_steps = 50
    return config.lock()
