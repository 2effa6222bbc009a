"""Every config trains two steps on photos as its recipe says; only sizes are shrunk.

Some with most of what recipes have between them always; the others with `make test-all`.

Through the parts that `train.py` puts together: source, transform, initial weights, program.
Configs that differ in nothing but sizes are the same when shrunk, and train once.
"""

import contextlib
import dataclasses
import itertools
import json
from typing import NamedTuple

import jax
import numpy as np
import pytest
import torch
from PIL import Image

import configs
import hybrid_flax
from configs import finetune
from hybrid_flax.build import resolve_classes, training_program
from hybrid_flax.data.loader import train_batches
from hybrid_flax.data.order import batches_per_epoch
from hybrid_flax.data.sources import source_of
from hybrid_flax.data.transforms import TrainTransform
from hybrid_flax.distributed.batch import to_devices
from hybrid_flax.distributed.mesh import make_mesh, replicated
from hybrid_flax.models.registry import family_of, tiny_model
from hybrid_flax.run.checkpoints import Checkpoints
from hybrid_flax.settings import Settings, from_config, to_plain
from hybrid_flax.start import initial_weights
from hybrid_flax.training.optimizers import trainable
from hybrid_flax.training.step import weights_of
from hybrid_flax.weights.paths import flatten
from tests.configs.test_configs import CONFIGS

CLASSES = 10
BATCH_SIZE = 8
PRETRAINED_CLASSES = 16  # in place of 21,841
KEPT = [15, 3, 0, 8, 1, 12, 9, 4, 7, 2]  # of those, by the class map


QUICK = ("glnet_9g_tklb", "quickstart")


class Run(NamedTuple):
    """Two steps; all arrays are on the host."""

    config: Settings
    states: list[dict]  # three: before, between, after
    metrics: list[dict]
    names: set[str]  # what a batch had


def shrink(config, photos):
    """The same recipe for a few small blocks, images and batches; groups are half a batch."""
    overrides = tiny_model(config.model.name)
    config.model.image_size = overrides.pop("image_size")
    with config.unlocked():
        config.model.overrides = overrides
    for section, field in ((config.augment, "mix_group"), (config.model, "batch_norm_group")):
        assert section[field] < config.batch_size
        section[field] = min(section[field], BATCH_SIZE // 2)
    config.optimizer.learning_rate_for_batch *= BATCH_SIZE
    config.optimizer.learning_rate_for_batch //= config.batch_size
    config.batch_size = BATCH_SIZE
    config.model.num_classes = min(config.model.num_classes, PRETRAINED_CLASSES)
    # Its rate for each size is in tests/golden/configs.json; equal programs compile once.
    config.model.drop_path = min(config.model.drop_path, 0.1)
    config.dataset.update(name="image_folder", path=str(photos), num_workers=0)
    if config.model.name.endswith("tklb"):
        config.dataset.label_maps = str(photos / "maps")


def take_two_steps(config: Settings) -> Run:
    mesh = make_mesh(jax.devices()[:1])
    source = source_of(config.dataset, "train")
    config = resolve_classes(config, source)
    transform = TrainTransform.from_config(config, source)
    program = training_program(config, mesh, batches_per_epoch(source, BATCH_SIZE))
    weights = initial_weights(config, program.fresh, mesh)
    state = jax.jit(program.begin, out_shardings=replicated(mesh))(weights)
    batches = train_batches(
        transform,
        batch_size=BATCH_SIZE,
        seed=config.seed,
        num_workers=config.dataset.num_workers,
        repeats=config.augment.repeats,
        group=config.augment.mix_group,
    )
    run = Run(config, [jax.device_get(state)], [], set())
    with contextlib.closing(batches):
        for batch in itertools.islice(batches, 2):
            batch = {name: x for name, x in batch.items() if name not in ("index", "unreadable")}
            state, metrics = program.train_step(state, to_devices(batch, mesh))
            run.names.update(batch)
            run.states.append(jax.device_get(state))
            run.metrics.append(jax.device_get(metrics))
    return run


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two photos of each class in train/, and a label map of each in maps/."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for label, number in itertools.product(range(CLASSES), range(2)):
        photo = folder / f"train/class{label}/{number}.JPEG"
        label_map = folder / f"maps/class{label}/{number}.pt"
        for file in (photo, label_map):
            file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(photo)
        logits, classes = rng.normal(size=(5, 6, 6)), rng.integers(0, CLASSES, (5, 6, 6))
        torch.save(torch.tensor(np.stack([logits, classes]), dtype=torch.float16), label_map)
    return folder


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    """name → its Run; fine-tuning starts from the weights that the run before it came to."""
    runs = {}

    def saved(name: str) -> str:
        folder = tmp_path_factory.mktemp(name)
        checkpoints = Checkpoints(folder / "checkpoints")
        model = configs.load(name).model.name
        checkpoints.save(2, weights_of(train(name).states[-1]), {"model": model})
        checkpoints.wait()
        (folder / "map.txt").write_text("".join(f"{row}\n" for row in KEPT))
        return str(folder)

    starts = {}

    def start_of(name: str) -> str:
        if name not in starts:
            starts[name] = saved(name)
        return starts[name]

    def train(name: str) -> Run:
        if name.startswith("finetune"):
            config = finetune.get_config(name.partition(":")[2])
            config.init_from = start_of("gcvit_xxt")
        else:
            config = configs.load(name)
        shrink(config, photos)
        if name in ("l2vit_b_22k_1k", "l2vit_b_384"):
            config.init_from = start_of("l2vit_b_22k")
            config.init_class_map = f"{config.init_from}/map.txt"
        config = from_config(config)
        variant = hybrid_flax.model_variant(config.model.name)
        small = dataclasses.replace(
            variant, **{"drop_path": config.model.drop_path, **config.model.overrides}
        )
        # Evaluation and the name of the model make no difference to training.
        recipe = to_plain(config) | {"eval": None}
        recipe["model"] = recipe["model"] | {"name": None}
        key = json.dumps(recipe, sort_keys=True), repr(small), type(small)
        if key not in runs:
            runs[key] = take_two_steps(config)
        return runs[key]

    return train


def rates(config, steps_per_epoch: int) -> tuple[float, float]:
    """Of the first two steps, which all recipes spend in a warm-up of more than an epoch."""
    optimizer, schedule = config.optimizer, config.schedule
    peak, first = optimizer.learning_rate, schedule.warmup_learning_rate
    if optimizer.learning_rate_for_batch:
        peak *= config.batch_size / optimizer.learning_rate_for_batch
    steps = schedule.warmup_epochs * steps_per_epoch - schedule.warmup_reaches_peak
    return first, first if schedule.each_epoch else first + (peak - first) / steps


@pytest.mark.parametrize(
    "name",
    [
        *QUICK,
        *(pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS if name not in QUICK),
        pytest.param("finetune:model=gcvit_xxt", marks=pytest.mark.slow),
    ],
)
def test_two_steps(trained, name):
    config, states, metrics, names = trained(name)
    before, between, after = (flatten(state["params"]) for state in states)

    for measured, rate in zip(metrics, rates(config, 2), strict=True):
        assert np.isfinite([measured["loss"], measured["grad_norm"]]).all()
        assert measured["grad_norm"] > 0
        assert measured["learning_rate"] == pytest.approx(rate, rel=1e-5)
    assert ("label_map" in names) == config.model.name.endswith("tklb")

    # Adam's first step is the rate in every number, where nothing decays; LAMB's is Adam's there.
    structure = family_of(config.model.name).model.structure
    biases = [path for path in before if structure.is_classifier(path) and path.endswith("/bias")]
    for old, new, rate in ((before, between, rates(config, 2)[0]), (between, after, None)):
        step = max(np.abs(new[path] - old[path]).max() for path in biases)
        if rate is None:
            assert 0 < step <= 1.002 * rates(config, 2)[1]  # Adam's second: 1.0014 at most
        else:
            assert step == pytest.approx(rate, rel=1e-2)

    learns = flatten(trainable(states[0]["params"], config.optimizer))
    moved = {path for path in before if (after[path] != before[path]).any()}
    assert moved <= {path for path, yes in learns.items() if yes}
    # Of a rate of 1e-8 those near 1 feel nothing.
    assert len(moved) > (0.9 if rates(config, 2)[1] > 1e-6 else 0.6) * sum(learns.values())

    state = flatten(states[2]["opt_state"])
    for moment in ("mu", "nu"):
        of = [path for path in state if f"/{moment}/" in f"/{path}"]
        assert len(of) == sum(learns.values())
        assert any(state[path].any() for path in of)
    assert ("ema" in states[2]) == bool(config.ema_decay)
    if config.ema_decay:
        average = states[0]["ema"]["params"]
        for number, new in enumerate((between, after)):
            decay = config.ema_decay
            if config.ema_warmup:
                decay = min(decay, (1 + number) / (10 + number))
            average = {
                path: decay * x + (1 - decay) * new[path] for path, x in flatten(average).items()
            }
        for path, got in flatten(states[2]["ema"]["params"]).items():
            np.testing.assert_allclose(got, average[path], rtol=1e-5, atol=1e-9)
    statistics = [flatten(states[i].get("batch_stats", {})) for i in (0, 2)]
    counts = [path for path in statistics[1] if path.endswith("/count")]
    for path in counts:  # not from 0 where the weights come from another run
        assert statistics[1][path] == statistics[0][path] + 2
    assert bool(counts) == ("batch_stats" in states[2])


@pytest.mark.slow
def test_fine_tuning_starts_from_the_classes_kept(trained):
    pretrained = flatten(trained("l2vit_b_22k").states[-1]["params"])
    start = flatten(trained("l2vit_b_22k_1k").states[0]["params"])
    assert pretrained.keys() == start.keys()
    for path, array in pretrained.items():
        structure = family_of("l2vit_b").model.structure
        kept = array[..., KEPT] if structure.is_classifier(path) else array
        np.testing.assert_array_equal(start[path], kept)
