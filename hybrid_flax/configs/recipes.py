"""One training recipe per paper; the model configs beside this file choose from them.

docs/recipes.md has the numbers as a table. D1 to D62 are the places, listed there, where an
authors' README, script and code disagree or are silent; a recipe names those it had to decide.

All five papers mix images, and some take batch statistics, over the images of one GPU. Which ones
those are is said here by `augment.mix_group` and `model.batch_norm_group`, so that a run is the
same on any number of devices. Each group draws its own λ, coin and box.
"""

import dataclasses

from ml_collections import ConfigDict

from hybrid_flax import settings
from hybrid_flax.models import registry


def _imagenet(name: str, *, batch_size: int, learning_rate: float) -> ConfigDict:
    """Gives every field its value as all five papers share it; docs/settings.md has them."""
    info = registry.model_info(name)
    crop = info.eval_transform
    config = settings.Settings(
        batch_size=batch_size,
        model=settings.Model(
            name=name,
            image_size=info.image_size,
            drop_path=registry.model_variant(name).drop_path,
        ),
        dataset=settings.Dataset(mean=crop.mean, std=crop.std),
        optimizer=settings.Optimizer(learning_rate=learning_rate),
        eval=settings.Eval(
            crop_fraction=crop.crop_fraction,
            crop_mode=crop.crop_mode,
            interpolation=crop.interpolation,
        ),
    )
    return ConfigDict(dataclasses.asdict(config)).lock()


def gcvit(name: str, *, batch_size: int, learning_rate: float = 5e-3) -> ConfigDict:
    """GC ViT on ImageNet-1k (arXiv:2206.09959), as the authors' configs and code train it.

    - D2: the batch is given per GPU, 128 for XXT to T2. A maintainer says that 32 GPUs were used,
      so 4096 images. The paper as quoted there says 128 in all with 1e-3.
    - D3: from S up it is 32 per GPU, here 1024, with the same learning rate and no scaling rule.
      With another batch, set `--config.optimizer.learning_rate` yourself, or say with
      `learning_rate_for_batch` which batch it is for.
    - D4: "310 epochs" runs 320: the cosine reaches its minimum after 310, ten more follow.
    - D7: evaluation during their training cut 0.875 of the image for all models; here every model
      is evaluated as its release was.
    - D8: `drop_path` is the models' own rate: the authors' command-line flag was never read.
    - D9: position tables decay: they have rank 2.
    - D2, D3: mixing is by the images of those 32 GPUs, on whole pixel values, before erasing.
    - Training used float16 with loss scaling; bfloat16 here needs no scaling.
    """
    config = _imagenet(name, batch_size=batch_size, learning_rate=learning_rate)
    config.epochs = 320
    config.augment.interpolation = "random"
    config.augment.mix_group = batch_size // 32
    config.augment.erase_before_mix = False
    config.ema_decay = 0.9998
    config.schedule.warmup_learning_rate = 1e-6
    config.schedule.min_learning_rate = 5e-6
    config.schedule.decay_epochs = 310.0
    config.schedule.decay_from_start = True
    return config


def l2vit(name: str) -> ConfigDict:
    """L2ViT from scratch on ImageNet-1k (arXiv:2501.16182).

    - Trained in float32 without clipping. `temperature` decays: it has rank 3.
    - D53: only Base's command is published; the drop path of Tiny and Small is ours (0.1 and 0.2).
    - A GPU had 128 images at a time. Of its running statistics the first GPU's were kept; ours move
      towards the mean of all.
    """
    config = _imagenet(name, batch_size=4096, learning_rate=4e-3)
    config.model.dtype = "float32"
    config.model.batch_norm_group = 128
    config.optimizer.clip_norm = 0.0
    config.schedule.warmup_reaches_peak = True
    return config


def l2vit_pretrain(name: str) -> ConfigDict:
    """L2ViT on ImageNet-22k, whose 21,841 classes come as folders: set `--config.dataset.path=`.

    - D52: the command leaves out the model's name; Base is what was released.
    - D55: the authors' code has no such dataset. Their class map to 1k follows their own order of
      the classes, which need not be that of your folders.
    - Mixing and smoothing are on, because nothing turns them off.
    """
    config = l2vit(name)
    config.batch_size = 1024
    config.epochs = 90
    config.dataset.name = "image_folder"
    config.model.num_classes = 21841
    config.model.drop_path = 0.2
    config.optimizer.learning_rate = 1e-3
    config.ema_decay = 0.0
    config.eval.every_epochs = 10
    config.schedule.warmup_epochs = 5.0
    config.schedule.warmup_learning_rate = 1e-6
    config.schedule.min_learning_rate = 1e-5
    config.schedule.decay_epochs = 90.0
    return config


def l2vit_finetune(name: str) -> ConfigDict:
    """L2ViT from its ImageNet-22k weights to 1k: set `--config.init_from=`.

    With `--config.init_class_map=` the authors' `custom_map22kto1k.txt` the classifier keeps the
    rows of the 1,000 classes; without it, it begins fresh.

    - D57: the commands leave mixup, cutmix and smoothing on, and so does this.
    - D59: the average is kept and evaluated as by the commands; the released files are the raw
      weights.
    - D60: the 384-pixel command does not name the model with windows of 12; the release is one.
    - A GPU had 64 images at a time.
    """
    config = l2vit(name)
    config.batch_size = 1024
    config.epochs = 30
    config.model.drop_path = 0.2
    config.model.batch_norm_group = config.augment.mix_group = 64
    config.optimizer.learning_rate = 4e-5
    config.optimizer.weight_decay = 1e-8
    config.schedule.warmup_epochs = 5.0
    config.schedule.warmup_learning_rate = 4e-8
    config.schedule.min_learning_rate = 4e-7
    config.schedule.decay_epochs = 30.0
    return config


def glnet(name: str) -> ConfigDict:
    """GLNet on ImageNet-1k (arXiv:2411.14429), by the README's numbers.

    - D16: the shipped script has drop path 0.1 for 4G and 9G, the README 0.15 and 0.3: the
      README's.
    - D17: the YAML has neither a learning rate nor clipping, the README both.
    - D29: the rank-0 `slot_scale` decays: the authors leave out rank 1 only.
    - A GPU had 128 images at a time. Of its running statistics the first GPU's were kept; ours move
      towards the mean of all.
    """
    config = _imagenet(name, batch_size=2048, learning_rate=2e-3)
    config.model.batch_norm_group = 128
    config.augment.repeats = 3
    config.optimizer.decay_also = (r"/slot_scale$",)
    config.schedule.warmup_epochs = 5.0
    config.schedule.min_learning_rate = 1e-5
    return config


def glnet_token_labelling(name: str) -> ConfigDict:
    """GLNet with token labelling: MixToken inside the model, no other mixing, no average.

    Name the folder of the label maps with `--config.dataset.label_maps=`; without them every token
    is taught its image's label.

    - D19: mixing and repeated augmentation in the YAML are ignored by the code: the code's.
    - D20: the rate changes once per epoch and, in the authors' loop, one epoch late
      (`lag_epochs`). Ten cool-down epochs in their config are never reached.
    - D29: `slot_scale` does not decay here, by timm's rule.
    - D30: the authors cut the label maps transposed; here as the image is cut, and as they did with
      `--config.loss.transposed_crops=True`.
    - Batch statistics are of the 128 images of a GPU; they average the running ones after each
      epoch, here they are averaged always.
    """
    config = _imagenet(name, batch_size=2048, learning_rate=5e-4)
    config.optimizer.learning_rate_for_batch = 512  # the program's rule: 2e-3 at 2048
    config.epochs = 310
    config.augment.interpolation = "random"
    config.augment.mixup_alpha = 0.0
    config.augment.cutmix_alpha = 0.0
    config.model.batch_norm_group = 128
    config.ema_decay = 0.0
    config.schedule.warmup_epochs = 5.0
    config.schedule.warmup_learning_rate = 1e-6
    config.schedule.min_learning_rate = 1e-5
    config.schedule.decay_epochs = 310.0
    config.schedule.decay_from_start = True
    config.schedule.each_epoch = True
    config.schedule.lag_epochs = 1
    return config


def gramian(name: str, *, learning_rate: float = 5e-3) -> ConfigDict:
    """Gramian attention heads on ImageNet-1k (arXiv:2310.16483), by the README's commands.

    - D42, D45: the README's names are not the code's; its models are those of width 688, 688, 976.
    - D44: GA-ResNet50 and GA-ViT-S are in the results without code: as GA-ConvNeXt, and as in
      timm's ViT the learned positions do not decay.
    - D46: timm's LAMB clips the global norm to 1 by itself; the commands' momentum does not reach
      it.
    - Evaluation cuts 0.875 of the image, which is what timm resolves for these models; a table for
      GA-CSWin that nothing reads says 0.9.
    - A GPU had 128 images at a time, two GPUs four times a step; mixing is on whole pixel values.
      Running statistics moved four times a step, and were averaged over the GPUs after each epoch;
      here they move once, towards the mean of the eight groups (`--config.accumulation_steps=4` for
      four times, where groups are made of the images that a micro-batch has).
    """
    config = _imagenet(name, batch_size=1024, learning_rate=learning_rate)
    config.augment.interpolation = "random"
    config.model.batch_norm_group = 128
    config.augment.repeats = 3
    config.augment.mixup_alpha = 0.2
    config.augment.erasing_probability = 0.0
    config.augment.erase_before_mix = False
    config.optimizer.name = "lamb"
    config.optimizer.clip_norm = 1.0
    if name == "ga_vit_s":
        config.optimizer.decay_never = (r"/positions$",)
    config.ema_decay = 0.0
    config.schedule.warmup_epochs = 3.0
    config.schedule.warmup_learning_rate = 1e-6
    config.schedule.decay_from_start = True
    config.schedule.each_epoch = True
    return config


def unified(name: str) -> ConfigDict:
    """The unified models on ImageNet-1k (arXiv:2211.05781).

    - D31: settings exist for transformers (HaloNet, PVT, Swin) and for CNNs (ConvNeXt), not for
      each size. Nothing says which ones InternImage used; here the transformers'.
    - D32: the program's defaults are the transformers', though its help quotes 4e-3 at 4096.
    - D33: weight decay goes by rank in PyTorch: it acts on the layer scales of HaloNet and
      ConvNeXt, which are stored with four axes there, and not on the others'.
    - Batch norms are synchronised over all GPUs. Mixing is by GPU, of which the scripts take 8.
    """
    mixer = registry.model_variant(name).mixer
    if mixer == "convnext":
        config = _imagenet(name, batch_size=4096, learning_rate=4e-3)
    else:
        config = _imagenet(name, batch_size=1024, learning_rate=1e-3)
        config.schedule.warmup_learning_rate = 1e-6
        config.schedule.min_learning_rate = 1e-5
    if mixer in ("halonet", "convnext"):
        config.optimizer.decay_also = (r"/gamma\d$",)
    if mixer == "swin":
        config.optimizer.decay_never = (r"/position_bias$",)
    config.augment.mix_group = config.batch_size // 8
    config.schedule.warmup_reaches_peak = True
    return config
