"""Each config, expanded: a changed number must show up here."""

import importlib
import pathlib
import subprocess
import sys

import pytest
from flax import nnx

import hybrid_flax
from hybrid_flax import bridge
from hybrid_flax.config import build_model, check
from hybrid_flax.workdir import to_plain

CONFIGS = sorted(path.stem for path in pathlib.Path("configs").glob("gcvit_*.py"))

GCVIT_B = {
    "accumulation_steps": 1,
    "augment": {
        "crop_ratio": [3 / 4, 4 / 3],
        "crop_scale": [0.08, 1.0],
        "cutmix_alpha": 1.0,
        "cutmix_probability": 0.5,
        "erasing_probability": 0.25,
        "flip": 0.5,
        "interpolation": "random",
        "mixup_alpha": 0.8,
        "rand_augment": "rand-m9-mstd0.5-inc1",
    },
    "batch_size": 1024,
    "checkpoint": {"every_steps": 500, "keep": 3},
    "dataset": {
        "mean": [0.485, 0.456, 0.406],
        "name": "imagenet2012",
        "num_workers": 8,
        "on_unreadable": "error",
        "path": "",
        "std": [0.229, 0.224, 0.225],
    },
    "ema_decay": 0.9998,
    "epochs": 320,
    "eval": {
        "batch_size": 256,
        "crop_fraction": 1.0,
        "crop_mode": "center",
        "every_epochs": 1,
        "interpolation": "bicubic",
    },
    "init_from": "",
    "log_every_steps": 50,
    "loss": {"label_smoothing": 0.1},
    "model": {
        "drop_path": 0.5,
        "dtype": "bfloat16",
        "image_size": 224,
        "name": "gcvit_b",
        "num_classes": 0,
        "overrides": {},
    },
    "optimizer": {
        "b1": 0.9,
        "b2": 0.999,
        "clip_norm": 5.0,
        "eps": 1e-8,
        "learning_rate": 5e-3,
        "weight_decay": 0.05,
    },
    "schedule": {
        "cosine_epochs": 310.0,
        "cosine_from_start": True,
        "min_learning_rate": 5e-6,
        "warmup_epochs": 20.0,
        "warmup_learning_rate": 1e-6,
    },
    "seed": 42,
}

SMALL_BATCH = {"batch_size": 4096}
FINE = {"optimizer.learning_rate": 1e-3, "model.drop_path": 0.1, "eval.crop_mode": "squash"}
DIFFERENCES = {
    "gcvit_xxt": SMALL_BATCH | {"model.drop_path": 0.2},
    "gcvit_xt": SMALL_BATCH | {"model.drop_path": 0.2, "eval.crop_fraction": 0.875},
    "gcvit_t": SMALL_BATCH | {"model.drop_path": 0.2},
    "gcvit_t2": SMALL_BATCH | {"model.drop_path": 0.25, "eval.crop_fraction": 0.875},
    "gcvit_s": {"model.drop_path": 0.3, "eval.crop_fraction": 0.875},
    "gcvit_s2": {"model.drop_path": 0.35, "eval.crop_fraction": 0.875},
    "gcvit_b": {},
    "gcvit_l": {},
    "gcvit_l_384": FINE | {"model.image_size": 384},
    "gcvit_l_512": FINE | {"model.image_size": 512},
}


def get_config(name):
    return importlib.import_module(f"configs.{name}").get_config()


def dotted(tree, prefix=""):
    flat = {}
    for key, value in tree.items():
        name = prefix + key
        flat |= dotted(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat


def test_there_is_one_config_for_every_model():
    assert CONFIGS == hybrid_flax.list_models("gcvit*")
    assert CONFIGS == sorted(DIFFERENCES)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_number_of_the_recipe(name):
    want = dotted(GCVIT_B) | {"model.name": name} | DIFFERENCES[name]
    assert dotted(to_plain(get_config(name))) == want


@pytest.mark.parametrize("name", [*CONFIGS, "quickstart"])
def test_every_config_is_valid_locked_and_builds(name):
    config = get_config(name)
    assert config.is_locked
    check(config)
    config.model.num_classes = 10
    model = bridge.abstract(lambda: build_model(config, rngs=nnx.Rngs(0)))
    assert model.image_size == config.model.image_size
    last = model.stages[3].blocks[-1]
    assert last.drop_path_rate == pytest.approx(config.model.drop_path)


def program(module, *arguments):
    return subprocess.run(
        [sys.executable, "-m", f"hybrid_flax.{module}", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.optimizer.learningrate=1"], 'Did you mean "learning_rate"'),
        (["--config.optimzer.learning_rate=1"], 'Did you mean "optimizer"'),
        (["--config.batch_size=many"], "flag --config.batch_size=many: invalid literal for int()"),
        (["--config.batch_size=1.5"], "flag --config.batch_size=1.5: invalid literal for int()"),
        (["--wrkdir=x"], "Unknown command line flag 'wrkdir'. Did you mean: workdir"),
        (["workdir=x"], "unexpected argument 'workdir=x'; flags begin with --"),
        ([], "--workdir is missing"),
    ],
)
def test_the_command_line_names_what_it_cannot_use(arguments, message):
    result = program("main", "--config=configs/quickstart.py", *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("main", [], "--config is missing; to try: --config=configs/quickstart.py"),
        ("main", ["--config=configs/none.py"], "cannot read the config file"),
        ("evaluate", ["--config=configs/quickstart.py", "--workdir=/nowhere"], "no checkpoint in"),
    ],
)
def test_missing_files_are_named(module, arguments, message):
    result = program(module, *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
