"""Settings of programs that use trained weights."""

import pytest

from hybrid_flax import cli
from hybrid_flax.as_trained import as_trained, warn_of_other_normalisation
from hybrid_flax.settings import to_plain
from tests import tiny


def meta(**changes):
    config = to_plain(tiny.settings(model__num_classes=10, **changes))
    return {"model": config["model"]["name"], "num_classes": 10, "config": config}


def test_a_run_has_its_own_settings(capsys, caplog):
    trained = meta(
        model__image_size=64,
        dataset__mean=(0.1, 0.2, 0.3),
        dataset__val_split="there",
        mesh__fsdp=8,
    )
    found = as_trained(tiny.get_config(), trained, given=())
    assert (found.model.image_size, found.model.num_classes) == (64, 10)
    assert (found.dataset.mean, found.dataset.val_split) == ((0.1, 0.2, 0.3), "there")
    assert found.mesh.fsdp == 1  # of the machine
    said = capsys.readouterr().out
    assert "as the weights were trained: model.image_size=64 (the config has 32), dataset." in said
    assert "num_classes" not in said
    assert not caplog.text


def test_what_is_given_wins_and_is_warned_of(capsys, caplog):
    trained = meta(model__image_size=64, dataset__mean=(0.1, 0.2, 0.3), eval__crop_fraction=1.0)
    given = ("model.image_size", "model.overrides.dims", "eval.batch_size")
    found = as_trained(tiny.get_config(eval__batch_size=7), trained, given)
    assert (found.model.image_size, found.eval.batch_size) == (32, 7)
    assert (found.dataset.mean, found.eval.crop_fraction) == ((0.1, 0.2, 0.3), 1.0)
    assert (
        "not as the weights were trained: --config.model.image_size=32 (trained with 64)"
        in caplog.text
    )
    assert "batch_size" not in caplog.text


def test_without_a_command_line_the_whole_config_is_meant(capsys, caplog):
    trained = meta(model__image_size=64, dataset__mean=(0.1, 0.2, 0.3))
    found = as_trained(tiny.get_config(), trained)
    assert (found.model.image_size, found.model.num_classes) == (32, 10)
    assert "model.image_size=32 (trained with 64), --config.dataset.mean=" in caplog.text
    assert not capsys.readouterr().out


def test_the_same_settings_need_no_words(capsys, caplog):
    assert (
        as_trained(tiny.get_config(), meta(), given=("model.image_size",)).model.num_classes == 10
    )
    assert not capsys.readouterr().out + caplog.text


def test_another_dataset_comes_with_its_own_path(capsys):
    trained = meta(dataset__name="image_folder", dataset__path="there", dataset__val_split="valid")
    found = as_trained(tiny.get_config(), trained, given=("dataset.name",)).dataset
    assert (found.name, found.path, found.val_split) == ("digits", "", "val")
    found = as_trained(tiny.get_config(), trained, given=("dataset.path",)).dataset
    assert (found.name, found.path, found.val_split) == ("image_folder", "", "valid")


def test_a_run_needs_no_config(capsys):
    found = as_trained(None, meta(model__image_size=64, mesh__fsdp=8), given=())
    assert (found.model.image_size, found.mesh.fsdp) == (64, 1)
    with pytest.raises(ValueError, match="--config is missing: these weights are of no training"):
        as_trained(None, {"model": "gcvit_b"}, given=())


def test_converted_weights_have_a_size_and_classes(caplog):
    converted = {"model": "unified_convnext_micro", "num_classes": 7, "image_size": 64}
    assert as_trained(tiny.get_config(), converted, given=()).model.image_size == 64
    found = as_trained(tiny.get_config(), converted, given=("model.image_size",))
    assert (found.model.image_size, found.model.num_classes) == (32, 7)
    assert "model.image_size=32 (trained with 64)" in caplog.text


def test_weights_normalised_otherwise_are_warned_of(caplog):
    warn_of_other_normalisation(tiny.settings(), meta())
    warn_of_other_normalisation(tiny.settings(), {})
    assert not caplog.text
    warn_of_other_normalisation(tiny.settings(), meta(dataset__std=(0.5, 0.5, 0.5)))
    assert "--config.dataset.std=[" in caplog.text
    assert "(trained with [0.5, 0.5, 0.5])" in caplog.text


def test_fields_are_given_in_every_way_that_flags_are_written(monkeypatch):
    arguments = [
        "--config=configs/gcvit_b.py",
        "--config.model.image_size=64",
        "-config.model.attention",  # as the version before called it
        "xla",
        "--noconfig.dataset.cache",
        "--config.model.overrides.dims=(1,)",
        "--workdir=config.seed",
    ]
    monkeypatch.setattr("sys.argv", ["evaluate", *arguments])
    assert cli.given_fields() == [
        "model.image_size",
        "model.implementation",
        "dataset.cache",
        "model.overrides.dims",
    ]
