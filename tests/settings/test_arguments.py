"""Configs are found by name from any folder, and fields of a Variant are given like settings."""

import pytest

import configs
from hybrid_flax.errors import InputError
from hybrid_flax.settings.arguments import (
    CONFIGS,
    override,
    take_overrides,
    with_found_config,
    with_home,
)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("quickstart", f"{CONFIGS}/quickstart.py"),
        ("gcvit_b.py", f"{CONFIGS}/gcvit_b.py"),
        ("configs/quickstart.py", f"{CONFIGS}/quickstart.py"),
        ("finetune:model=gcvit_b,epochs=3", f"{CONFIGS}/finetune.py:model=gcvit_b,epochs=3"),
        ("mine.py", "mine.py"),
        ("mine.py:a=b", "mine.py:a=b"),
    ],
)
def test_a_config_is_found_by_name_from_another_folder(given, found, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("")
    (tmp_path / "quickstart").mkdir()  # a folder is no config
    assert with_found_config(["main", f"--config={given}", "--x"]) == [
        *("main", f"--config={found}", "--x")
    ]
    assert with_found_config(["main", "--config", given]) == ["main", "--config", found]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("quickstrat", "no such file, nor a config of this package. Did you mean quickstart?"),
        ("runs/quickstart.py", "--config=runs/quickstart.py: no such file"),
        ("__init__", "no such file"),
        ("x" * 5000, "no such file"),
    ],
)
def test_what_is_not_there_is_refused_by_name(given, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        with_found_config([f"--config={given}"])
    assert message in str(error.value)


def test_fields_of_a_variant_are_set_beside_those_of_the_config():
    arguments = (
        "main --config=quickstart --config.model.overrides.depths=(1,1,1,1) --config.epochs=3 "
        "--config.model.overrides.mlp_ratio 2 --config.model.overrides.mixer=pooling"
    )
    others, fields = take_overrides(arguments.split())
    assert others == ["main", "--config=quickstart", "--config.epochs=3"]
    assert fields == {"depths": (1, 1, 1, 1), "mlp_ratio": 2, "mixer": "pooling"}
    config = configs.load("quickstart")
    override(config, fields)
    assert config.model.overrides.to_dict() == {"dim": 32, **fields}
    override(configs.load("gcvit_b"), {})


@pytest.mark.parametrize("argument", ["dims.x=3", "=3", "a-b=1"])
def test_what_no_field_is_called_is_refused(argument):
    with pytest.raises(InputError, match="expected --config.model.overrides.FIELD=VALUE"):
        take_overrides([f"--config.model.overrides.{argument}"])


def test_two_configs_are_refused():
    with pytest.raises(InputError, match="--config is given more than once"):
        with_found_config(["main", "--config=gcvit_b", "--config", "gcvit_t"])


def test_digits_without_end_are_a_text():
    _, fields = take_overrides([f"--config.model.overrides.dim={'9' * 5000}"])
    assert fields == {"dim": "9" * 5000}


def test_the_home_folder_is_found_behind_an_equals_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = ["train", "--workdir=~/run", "~", "--config.init_from=~/a=~/b", "--x=a~/b", "-m", "~me"]
    assert with_home(given) == [
        "train", "--workdir=/home/me/run", "/home/me", "--config.init_from=/home/me/a=~/b",
        "--x=a~/b", "-m", "~me",
    ]  # fmt: skip
