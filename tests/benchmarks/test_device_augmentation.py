"""The benchmark of the augmentation on the device: what it runs, prints and refuses."""

import json

import pytest

from benchmarks import device_augmentation
from hybrid_flax.settings import from_config
from tests import tiny


@pytest.mark.slow
def test_both_are_timed_on_the_same_batch(tmp_path, capsys):
    config = tiny.settings(batch_size=4, model__num_classes=10)
    file = tmp_path / "figures.json"
    assert device_augmentation.measure(config, 1, file) == 0
    result = json.loads(file.read_text())
    times = result["median_milliseconds"]
    assert min(times["augmentation"], times["training step"]) > 0
    assert result["share_of_the_step"] == pytest.approx(
        times["augmentation"] / times["training step"], rel=0.05
    )
    said = capsys.readouterr().out
    assert "unified_convnext_micro, 4 images of 32 pixels, float32, on cpu" in said
    assert f"augmentation {times['augmentation']} ms   training step " in said
    assert "of the step" in said


def test_what_cannot_be_measured_is_said(capsys):
    for arguments, message in (
        (["--batch_size=129"], "augment.mix_group=128: 129 images"),
        (["--save=/nowhere/x.json"], "there is no folder /nowhere"),
    ):
        assert device_augmentation.main(arguments) == 2
        assert message in capsys.readouterr().err
    config = from_config(tiny.gcvit(batch_size=4, model__num_classes=10, model__image_size=33))
    assert device_augmentation.measure(config, 1, None) == 1
    assert "training step: InputError: image_size=33" in capsys.readouterr().err
