"""Every declared setting is checked, documented, and understood in files of earlier versions."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

import configs
from hybrid_flax import settings
from hybrid_flax.data.augmentation.auto_augment import SUB_POLICIES
from hybrid_flax.data.images import FILTERS
from hybrid_flax.distributed import mesh
from hybrid_flax.errors import InputError
from hybrid_flax.run.workdir import Workdir, differences
from hybrid_flax.settings import FIELDS, reading, sections
from hybrid_flax.settings import __main__ as page
from hybrid_flax.settings.together import NEEDS
from hybrid_flax.weights.functions import REMAT
from pallas.dispatch import IMPLEMENTATIONS

PLAIN = settings.Settings(
    batch_size=8,
    model=settings.Model(name="gcvit_xxt", image_size=32, drop_path=0.0),
    optimizer=settings.Optimizer(learning_rate=1e-3),
)
NO_VALUE_OF_ANY = (None, math.nan, math.inf, -math.inf, -1e-10, -7, object(), {1: 2}, ({},))
BAD = {  # by type: what a careless hand writes
    int: (1.5, "1", True, (1,)),
    float: ("0.1", True, False, (0.1,)),
    bool: ("yes", 0, 1),
    str: (0, True, ("a",)),
    tuple: (1, "x", (1,), ("(",), (0.2, math.nan), (math.inf,) * 3, (0.0, "1", 1), [1, 2, 3, 4, 5]),
    dict: (1, "x", ((1, 2),)),
}


def kind(name: str) -> type:
    section, _, field = name.rpartition(".")
    return type(getattr(getattr(PLAIN, section) if section else PLAIN, field))


@pytest.mark.parametrize("name", FIELDS)
def test_no_field_takes_a_bad_value(name):
    allowed = {"loss.diversity": (-7, -1e-10)}.get(name, ())
    for value in (*NO_VALUE_OF_ANY, *BAD[kind(name)]):
        if value in allowed:
            continue
        with pytest.raises(InputError) as error:
            settings.replace(PLAIN, {name: value})
        assert f"--config.{name}={value!r}".replace("[1", "(1").replace("5]", "5)") in str(
            error.value
        )
        assert f": expected {FIELDS[name].expected.words}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("seed", -1, "a whole number from 0 to 9223372036854775807"),
        ("epochs", 0, "a whole number from 1"),
        ("augment.mixup_alpha", -1e-10, "a number from 0 to 1e+06"),
        ("augment.mix_group", -1, "a whole number from 0"),
        ("augment.auto_augment", "autoaugment", "one of rand-m9-mstd0.5-inc1 (and the like), "),
        ("dataset.std", (0, 0, 0), "three numbers from 0.001 to 1"),
        ("dataset.std", (0.2,), "three numbers from 0.001 to 1"),
        ("dataset.mean", (124, 116, 104), "three numbers from 0 to 1"),
        ("optimizer.learning_rate", math.inf, "a number above 0, up to 1000"),
        ("dataset.std", (58.4, 57.1, 57.4), "three numbers from 0.001 to 1"),
        ("eval.crop_fraction", 1e-6, "a number from 0.05 to 1"),
        ("optimizer.eps", 1e-60, "a number above 0, up to 1"),  # 0 in float32
        ("ema_decay", 1 - 1e-12, "a number from 0 to below 1"),  # 1 in float32
        ("batch_size", 10**400, "a whole number from 1 to 1048576"),
        ("model.image_size", 10**6, "a whole number from 1 to 16384"),
        ("dataset.path", "x\0y", "a text of at most 4096 characters"),
        ("optimizer.name", "adam", "one of 'adamw', 'lamb', 'sgd', 'lion', 'adafactor'"),
        ("optimizer.b2", 1.0, "a number from 0 to below 1"),
        ("optimizer.layer_decay", 0.0, "a number above 0, up to 1"),
        ("optimizer.freeze", ("(",), "a tuple of regular expressions"),
        ("schedule.name", "cosin", "one of 'cosine', 'linear', 'constant', 'step', 'onecycle'"),
        ("schedule.step_factor", 1.0, "a number above 0 and below 1"),
        ("schedule.warmup_epochs", -1.0, "a number from 0 to 1e+06"),
        ("model.num_classes", -1, "a whole number from 0"),
        ("mesh.fsdp", 0, "a whole number from 1 to 1000000000, or -1"),
        ("sharding.rules", (("(", ()),), "a tuple of pairs such as ('/fc1/kernel$', "),
        ("sharding.rules", (("x", ("model",)),), "a tuple of pairs such as ('/fc1/kernel$', "),
    ],
)
def test_the_message_says_in_words_what_is_expected(name, value, expected):
    with pytest.raises(InputError) as error:
        settings.replace(PLAIN, {name: value})
    assert str(error.value).startswith(f"--config.{name}={value!r}: expected {expected}")


def test_all_problems_are_named_at_once():
    with pytest.raises(InputError) as error:
        settings.from_config({"seed": -1, "model": {"nam": "x"}, "epochs": "3"})
    lines = str(error.value).splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "--config.model.nam",
        "--config.seed=-1",
        *(
            "--config.batch_size is missing",
            "--config.epochs='3'",
            "--config.model.name is missing",
        ),
        *("--config.model.image_size is missing", "--config.model.drop_path is missing"),
        "--config.optimizer.learning_rate is missing",
    ]
    assert lines[0].endswith("there is no such setting. Did you mean model.name?")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"augment.mix_group": 96, "batch_size": 256},
            "--config.augment.mix_group=96: 256 images (--config.batch_size=256, "
            "--config.accumulation_steps=1) are not a multiple of it; use 0 for one group of all, "
            "or for example 64",
        ),
        (
            {"model.batch_norm_group": 100, "batch_size": 256, "accumulation_steps": 2},
            "--config.model.batch_norm_group=100: 128 images",
        ),
        (
            {"dataset.label_maps": "maps"},
            "--config.dataset.label_maps: images with label maps are mixed inside the model; set "
            "--config.augment.mixup_alpha=0 and --config.augment.cutmix_alpha=0",
        ),
        ({"init_class_map": "map.txt"}, "--config.init_class_map: there are no weights whose rows"),
        (
            {"model.overrides": {"drop_path": 0.3}},
            "--config.model.overrides.drop_path: this is a setting of its own, use --config.model.",
        ),
        (
            {"model.image_size": 4096, "eval.crop_fraction": 0.1},
            "--config.eval.crop_fraction=0.1: for a crop of --config.model.image_size=4096 pixels",
        ),
    ],
)
def test_what_does_not_go_together_is_named(changes, message):
    with pytest.raises(InputError) as error:
        settings.replace(PLAIN, changes)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"optimizer.momentum": 0.5},
            "--config.optimizer.momentum=0.5 has no effect: optimizer.na",
        ),
        ({"optimizer.name": "sgd", "optimizer.b2": 0.95}, "--config.optimizer.b2=0.95 has no"),
        ({"schedule.step_epochs": 7.0}, "--config.schedule.step_epochs=7.0 has no effect: only"),
        ({"loss.diversity": -0.5}, "--config.loss.diversity=-0.5 has no effect: only models with"),
        ({"ema_decay": 0.0, "ema_warmup": True}, "--config.ema_warmup=True has no effect: there"),
        (
            {"dataset.name": "digits", "dataset.path": "x"},
            "--config.dataset.path='x' has no effect",
        ),
        (
            {"augment.mixup_alpha": 0.0, "augment.cutmix_probability": 0.9},
            "--config.augment.cutmix_probability=0.9 has no effect: it chooses between",
        ),
        (
            {"schedule.name": "constant", "schedule.decay_from_start": True},
            "--config.schedule.decay_from_start=True has no effect: schedule.name=constant",
        ),
        (
            {"schedule.warmup_epochs": 0.0, "schedule.warmup_learning_rate": 0.1},
            "--config.schedule.warmup_learning_rate=0.1 has no effect: there is no warm-up",
        ),
        (
            {"optimizer.weight_decay": 0.0, "optimizer.decay_also": ("x",)},
            "--config.optimizer.decay_also=('x',) has no effect: nothing decays",
        ),
        (
            {"epochs": 30},
            "--config.epochs=30: the run ends before the learning rate is at its minimum; for that "
            "also set --config.schedule.decay_epochs=30 (it is 300)",
        ),
        ({"epochs": 20}, "--config.epochs=20: the run ends within the warm-up of --config.schedul"),
    ],
)
def test_what_has_no_effect_is_said_once(changes, sentence, caplog):
    reading._say_once.cache_clear()
    for _ in range(2):
        settings.replace(PLAIN, changes)
    assert caplog.text.count(sentence) == 1


def test_nothing_in_our_configs_is_without_effect(caplog):
    reading._say_once.cache_clear()
    for name in (*configs.names(), "quickstart", "finetune"):
        settings.from_config(configs.load(name))
    assert not caplog.text


def test_every_need_names_fields_that_are_there():
    assert {name for need in NEEDS for name in need.fields} <= FIELDS.keys()


def test_sections_are_typed_and_cannot_be_changed():
    assert PLAIN.dataset.std == (0.229, 0.224, 0.225)
    with pytest.raises(dataclasses.FrozenInstanceError):
        PLAIN.optimizer.learning_rate = 1.0
    changed = settings.replace(PLAIN, {"model.overrides": {"depths": [1, 2]}})
    assert changed.model.overrides == {"depths": (1, 2)}
    assert PLAIN.model.overrides == {}


def test_a_config_dict_and_its_file_say_the_same():
    config = configs.load("quickstart")
    read = settings.from_config(config)
    assert read.model.overrides == {"dim": 32, "depths": (2, 2, 2, 2)}
    plain = json.loads(json.dumps(settings.to_plain(read)))
    assert settings.from_config(plain) == read
    assert settings.from_saved(plain) == plain


def test_every_choice_is_one_that_its_component_has():
    assert set(sections.FILTERS) == set(FILTERS)
    assert sections.IMPLEMENTATIONS == IMPLEMENTATIONS
    assert set(sections.REMATERIALISED) == set(REMAT)
    assert set(sections.POLICIES) == {"rand", *SUB_POLICIES}
    assert sections.AXES == mesh.AXES


def saved_before(change) -> dict:
    """A config.json as the version before this one wrote it."""
    plain = settings.to_plain(PLAIN)
    plain["model"]["attention"] = plain["model"].pop("implementation")
    plain["loss"] = {"name": "softmax", "label_smoothing": 0.1}
    change(plain)
    return plain


def test_a_run_of_the_version_before_goes_on(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(json.dumps(saved_before(lambda plain: None)))
    with Workdir(str(tmp_path), PLAIN):
        assert json.loads((tmp_path / "config.json").read_text()) == settings.to_plain(PLAIN)


def test_another_value_under_an_old_name_is_another_run(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    saved = saved_before(lambda plain: plain["model"].update(attention="pallas"))
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with (
        pytest.raises(InputError, match="implementation: the run has 'pallas', you gave 'auto'"),
        Workdir(str(tmp_path), PLAIN),
    ):
        pass


def test_a_config_file_of_the_version_before_is_read_with_a_warning(caplog):
    config = ConfigDict(saved_before(lambda plain: plain["model"].update(attention="xla")))
    assert settings.from_config(config).model.implementation == "xla"
    assert "--config.model.attention is called --config.model.implementation now" in caplog.text


def test_what_a_resumed_run_may_change_and_what_belongs_to_a_host():
    host = {name for name, field in FIELDS.items() if field.of_host}
    assert host == {f"dataset.{name}" for name in ("cache", "index", "num_workers", "path")}
    free = {name for name, field in FIELDS.items() if field.free}
    whole_sections = {name for name in FIELDS if name.startswith(("checkpoint.", "mesh.", "shard"))}
    alone = {"log_every_steps", "non_finite_limit", "on_non_finite", "watchdog_seconds"}
    assert free == host | whole_sections | alone | {"eval.batch_size", "eval.every_epochs"}
    other = settings.replace(PLAIN, {"dataset.path": "elsewhere", "seed": 1})
    found = differences(settings.to_plain(PLAIN), settings.to_plain(other), host)
    assert found == [("seed", 42, 1)]


def test_the_page_of_settings_is_current():
    assert page.FILE.read_text() == page.document(), "python -m hybrid_flax.settings"


def test_settings_need_nothing_but_python():
    program = (
        "import sys, hybrid_flax.settings; "
        "print({name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names)"
    )
    done = subprocess.run([sys.executable, "-S", "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() in ("{'hybrid_flax', '__main__'}", "{'__main__', 'hybrid_flax'}")
