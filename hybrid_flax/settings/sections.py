"""Every setting of a training run, declared once: type, default, meaning, and what it may be.

`free` settings do not change what is learned, so that a resumed run may have others; those
`of_host` may differ between the processes of one run, and are free as well.

A setting that is added gets the default that leaves earlier runs as they were: a config.json that
lacks it is read as having its default.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from hybrid_flax.settings.expected import (
    FIELDS_BY_NAME,
    FLAG,
    NAME,
    PATTERNS,
    TEXT,
    Expected,
    interval,
    number,
    one_of,
    rules,
    setting,
    several,
    text_like,
    whole,
)

AXES = ("data", "fsdp", "tensor")  # of the device mesh
FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
OPTIMIZERS = ("adamw", "lamb", "sgd", "lion", "adafactor")
SCHEDULES = ("cosine", "linear", "constant", "step", "onecycle")
IMPLEMENTATIONS = ("auto", "pallas", "xla")
REMATERIALISED = ("none", "blocks", "dots")
POLICIES = ("rand", "original", "originalr", "v0", "v0r", "3a")  # names before the first hyphen
FRACTION = number(0, 1)
BELOW_ONE = number(0, 1, below=True)
NOT_NEGATIVE = number(0)
POSITIVE = number(0, above=True)
RATE = number(0, 1000, above=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """Which network is trained, and how it is computed."""

    name: str = setting("model, one of `hybrid_flax.list_models()`", NAME)
    num_classes: int = setting(
        "width of the classifier; 0: the dataset's classes", whole(0, 10**6), 0
    )
    image_size: int = setting("height and width of the model's images, in pixels", whole(1, 16384))
    dtype: str = setting(
        "type of the computation; parameters and optimizer are float32",
        one_of("bfloat16", "float32"),
        "bfloat16",
    )
    drop_path: float = setting("highest probability that a block is left out", BELOW_ONE)
    eval_mode: bool = setting(
        "train as in evaluation: running statistics, no drop path", FLAG, False
    )
    implementation: str = setting(
        "what computes attention in windows and deformable sampling, Pallas kernels or XLA; auto: "
        "as pallas/*/choice.py says",
        one_of(*IMPLEMENTATIONS),
        "auto",
    )
    remat: str = setting(
        "what the backward pass computes again, for less memory: nothing, all of each block, or "
        "all but its matrix products",
        one_of(*REMATERIALISED),
        "none",
    )
    scan_blocks: str = setting(
        "whether equal blocks run as a loop, which compiles sooner and changes the last bits; "
        "auto: as hybrid_flax/scan_choice.py says",
        one_of("auto", "on", "off"),
        "auto",
    )
    batch_norm_group: int = setting(
        "images that share batch statistics in training; 0: a whole micro-batch", whole(0), 0
    )
    overrides: Mapping[str, Any] = setting(
        "other fields of the family's Variant", FIELDS_BY_NAME, {}
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """The images and labels to train with."""

    name: str = setting(
        "a TFDS name, or image_folder, list_files, tar_shards, hugging_face, digits",
        NAME,
        "imagenet2012",
    )
    path: str = setting("folder of the images, or TFDS's data folder", TEXT, "", of_host=True)
    train_split: str = setting(
        "name of the training images in the data, or of a part: `train[:90%]`", NAME, "train"
    )
    val_split: str = setting("name of the images that measure accuracy, likewise", NAME, "val")
    index: str = setting(
        "folder for the index of tar files; empty: beside them", TEXT, "", of_host=True
    )
    image_column: str = setting(
        "name of the images among a table's columns, TFDS's features, or the endings of a tar "
        "file's members; empty: the usual ones",
        TEXT,
        "",
    )
    label_column: str = setting(
        "name of the class numbers likewise, or a field of KEY.json in tar files", TEXT, ""
    )
    cache: bool = setting("read all files once and keep them in memory", FLAG, False, of_host=True)
    decode: str = setting(
        "fast: a training photo at a fraction of its size where the crop is at least twice as "
        "large as the model's image; the papers did not",
        one_of("exact", "fast"),
        "exact",
    )
    mean: tuple[float, float, float] = setting(
        "mean of red, green and blue as values from 0 to 1, which is subtracted",
        several(3, FRACTION, "three numbers from 0 to 1"),
        (0.485, 0.456, 0.406),
    )
    std: tuple[float, float, float] = setting(
        "standard deviation likewise, which divides",
        several(3, number(0.001, 1), "three numbers from 0.001 to 1"),
        (0.229, 0.224, 0.225),
    )
    num_workers: int = setting(
        "processes that prepare batches; 0: threads of this one", whole(0, 1024), 8, of_host=True
    )
    on_unreadable: str = setting(
        "what to do at an image that cannot be decoded: stop, or leave it out and say so",
        one_of("error", "skip"),
        "error",
    )
    label_maps: str = setting("folder of label maps, for token labelling", TEXT, "")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augment:
    """Changes of training images: crop to policy on the host, the rest on the device."""

    crop_scale: tuple[float, float] = setting(
        "share of the photo's area that a crop has", interval(1), (0.08, 1.0)
    )
    crop_ratio: tuple[float, float] = setting(
        "width of a crop over its height", interval(100), (3 / 4, 4 / 3)
    )
    interpolation: str = setting(
        "filter of resizing; random: bilinear or bicubic", one_of("random", *FILTERS), "bicubic"
    )
    flip: float = setting("probability of mirroring", FRACTION, 0.5)
    vertical_flip: float = setting("probability of turning upside down", FRACTION, 0.0)
    auto_augment: str = setting(
        "policy, as timm writes it; empty: none",
        text_like(
            rf"|trivial-wide|ta_wide|({'|'.join(POLICIES)})(-[a-z]+[0-9.]*)*",
            "one of rand-m9-mstd0.5-inc1 (and the like), "
            f"{', '.join(POLICIES[1:])}, trivial-wide, or '' for none",
        ),
        "rand-m9-mstd0.5-inc1",
    )
    colour_jitter: tuple[float, float, float, float] = setting(
        "strengths of changes of colour; only where `auto_augment` is empty or has 3a in it",
        Expected(
            "strengths (brightness, contrast, saturation, hue) from 0, the last up to 0.5",
            lambda x: several(4, NOT_NEGATIVE, "").fits(x) and x[3] <= 0.5,
        ),
        (0.4, 0.4, 0.4, 0.0),
    )
    repeats: int = setting("crops of an image in a batch: repeated augmentation", whole(1, 100), 1)
    mixup_alpha: float = setting("mixup's α, of Beta(α, α); 0: no mixup", NOT_NEGATIVE, 0.8)
    cutmix_alpha: float = setting("cutmix's α; 0: no cutmix", NOT_NEGATIVE, 1.0)
    cutmix_probability: float = setting("probability of cutmix in place of mixup", FRACTION, 0.5)
    mix_probability: float = setting("probability that a group is mixed at all", FRACTION, 1.0)
    mix_group: int = setting("images that are mixed alike; 0: the whole batch", whole(0), 128)
    mix_off_epoch: int = setting("the first epoch without mixing; 0: all have it", whole(0), 0)
    erasing_probability: float = setting("probability of random erasing", FRACTION, 0.25)
    erase_before_mix: bool = setting(
        "False: mix whole pixel values first, so that noise stays unmixed", FLAG, True
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
    """Numbers of the loss; which loss it is follows from what the model returns in training."""

    label_smoothing: float = setting(
        "share of a target that is spread over all classes", BELOW_ONE, 0.1
    )
    diversity: float = setting(
        "Gramian heads only: weight of their divergence; negative drives them apart",
        number(-1000, 1000),
        -0.8,
    )
    dense_weight: float = setting(
        "token labelling only: weight of the tokens' loss", NOT_NEGATIVE, 0.5
    )
    transposed_crops: bool = setting(
        "token labelling only: cut label maps out as the authors' code does (D30)", FLAG, False
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """How gradients become updates."""

    name: str = setting("rule that makes updates of gradients", one_of(*OPTIMIZERS), "adamw")
    learning_rate: float = setting("learning rate at the schedule's peak", RATE)
    learning_rate_for_batch: int = setting(
        "batch that this rate is for, scaled to others in proportion; 0: not scaled", whole(0), 0
    )
    b1: float = setting("decay of the first moment, in adamw, lamb and lion", BELOW_ONE, 0.9)
    b2: float = setting("decay of the second moment, likewise", BELOW_ONE, 0.999)
    eps: float = setting(
        "what is added to the root of the second moment, in adamw and lamb",
        number(0, 1, above=True),
        1e-8,
    )
    momentum: float = setting("momentum of sgd", BELOW_ONE, 0.9)
    nesterov: bool = setting("whether momentum is Nesterov's, in sgd", FLAG, False)
    weight_decay: float = setting(
        "weight decay of parameters of rank 2 or more", NOT_NEGATIVE, 0.05
    )
    decay_also: tuple[str, ...] = setting("paths of parameters that decay, too", PATTERNS, ())
    decay_never: tuple[str, ...] = setting("paths of parameters that do not decay", PATTERNS, ())
    layer_decay: float = setting(
        "factor of the learning rate for each layer, from the classifier down; 1: off",
        number(0, 1, above=True),
        1.0,
    )
    freeze: tuple[str, ...] = setting(
        "paths of parameters that do not learn; `('^(?!head/)',)`: all but the head", PATTERNS, ()
    )
    clip_norm: float = setting(
        "highest norm of all gradients together; 0: no clipping", NOT_NEGATIVE, 5.0
    )
    clip_value: float = setting(
        "highest size of each number of a gradient; 0: no clipping", NOT_NEGATIVE, 0.0
    )
    clip_adaptive: float = setting(
        "highest norm of a unit's gradient over its weights', but the head's; 0: no clipping",
        NOT_NEGATIVE,
        0.0,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate over time: docs/recipes.md has the formulas."""

    name: str = setting("way from the peak to the minimum", one_of(*SCHEDULES), "cosine")
    warmup_epochs: float = setting("epochs in which the rate rises to its peak", NOT_NEGATIVE, 20.0)
    warmup_learning_rate: float = setting("learning rate at step 0", number(0, 1000), 0.0)
    min_learning_rate: float = setting("learning rate at the end", number(0, 1000), 1e-6)
    decay_epochs: float = setting("epoch at which the minimum is reached", POSITIVE, 300.0)
    decay_from_start: bool = setting(
        "count the way from step 0, not from the end of the warm-up", FLAG, False
    )
    step_epochs: float = setting("step only: epochs between falls of the rate", POSITIVE, 30.0)
    step_factor: float = setting(
        "step only: what the rate is multiplied by", number(0, 1, above=True, below=True), 0.1
    )
    warmup_reaches_peak: bool = setting(
        "the warm-up's last step has the peak rate, not the step after it", FLAG, False
    )
    each_epoch: bool = setting("change the rate only between epochs", FLAG, False)
    lag_epochs: int = setting("how many epochs late the rate changes", whole(0), 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Eval:
    """How accuracy is measured."""

    crop_fraction: float = setting(
        "side of the crop over the resized image's", number(0.05, 1), 0.875
    )
    crop_mode: str = setting(
        "center keeps the aspect ratio, squash does not", one_of("center", "squash"), "center"
    )
    interpolation: str = setting("filter of resizing", one_of(*FILTERS), "bicubic")
    batch_size: int = setting(
        "images evaluated at a time, over all devices", whole(1, 2**20), 256, free=True
    )
    every_epochs: int = setting("epochs between evaluations", whole(1), 1, free=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When training is saved, and what is kept."""

    every_steps: int = setting("steps between checkpoints", whole(1), 500, free=True)
    keep: int = setting(
        "how many of the newest checkpoints are kept, and besides", whole(1), 3, free=True
    )
    keep_every_steps: int = setting(
        "the multiples of this, which are saved too; 0: none", whole(0), 0, free=True
    )
    keep_best: int = setting(
        "how many of the best in evaluation, by averaged weights if there are",
        whole(0),
        0,
        free=True,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """Sizes of the device mesh; one may be -1, the rest of the devices."""

    data: int = setting(
        "size of the axis that splits the images", whole(1, special=(-1,)), -1, free=True
    )
    fsdp: int = setting(
        "size of the axis that splits images and weights", whole(1, special=(-1,)), 1, free=True
    )
    tensor: int = setting(
        "size of the axis that splits MLPs, heads and classifiers",
        whole(1, special=(-1,)),
        1,
        free=True,
    )
    num_slices: int = setting(
        "slices of a TPU pod, side by side on data; 0: as many as there are",
        whole(0),
        0,
        free=True,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sharding:
    """The split of the training state over the mesh: distributed/shardings.py."""

    rules: tuple[tuple[str, tuple[str | None, ...]], ...] = setting(
        "pairs (pattern, axes) to try before the model's rules", rules(AXES), (), free=True
    )
    optimizer_over_data: bool = setting(
        "split optimizer and average over data, too: ZeRO stage 1", FLAG, False, free=True
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All settings of a training run."""

    seed: int = setting("where all randomness comes from", whole(0, 2**63 - 1), 42)
    batch_size: int = setting("images over all devices and accumulation steps", whole(1, 2**20))
    accumulation_steps: int = setting("parts in which a batch is computed", whole(1, 2**20), 1)
    epochs: int = setting("how often the training images are seen", whole(1, 10**6), 300)
    init_from: str = setting(
        "weights to fine-tune: the folder of a run or a converted checkpoint, a released file, or "
        "pretrained",
        TEXT,
        "",
    )
    init_class_map: str = setting(
        "file of the rows of its classifier to keep, one per class", TEXT, ""
    )
    ema_decay: float = setting("decay of the averaged weights; 0: no average", BELOW_ONE, 0.9999)
    ema_warmup: bool = setting(
        "the average begins with (1 + step) / (10 + step) where that is less", FLAG, False
    )
    log_every_steps: int = setting("steps between lines of metrics", whole(1), 50, free=True)
    watchdog_seconds: float = setting(
        "seconds without progress after which the run ends with status 124; 0: wait for ever",
        NOT_NEGATIVE,
        900.0,
        free=True,
    )
    on_non_finite: str = setting(
        "what to do at a step whose loss or gradients are not finite, which changes no weight: "
        "stop, skip it, or roll_back to the last checkpoint and leave its batch out",
        one_of("stop", "skip", "roll_back"),
        "stop",
        free=True,
    )
    non_finite_limit: int = setting("how many such steps at most", whole(0), 10, free=True)

    model: Model
    dataset: Dataset = dataclasses.field(default_factory=Dataset)
    augment: Augment = dataclasses.field(default_factory=Augment)
    loss: Loss = dataclasses.field(default_factory=Loss)
    optimizer: Optimizer
    schedule: Schedule = dataclasses.field(default_factory=Schedule)
    eval: Eval = dataclasses.field(default_factory=Eval)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    sharding: Sharding = dataclasses.field(default_factory=Sharding)
