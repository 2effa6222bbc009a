import csv
import re

import jax
import numpy as np
import pytest

import hybrid_flax
from hybrid_flax.compare_predictions import main as compare
from hybrid_flax.errors import InputError
from hybrid_flax.evaluation import sets, sweep
from hybrid_flax.models.info import EvalTransform
from hybrid_flax.opened import Opened
from tests import reference
from tests.evaluation.test_sets import image

TINY = {"dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "image_size": 32}


@pytest.fixture(scope="module")
def opened():
    model = reference.model("unified_convnext_micro", num_classes=1000, **TINY)
    transform = EvalTransform(0.875, "center", "bicubic")
    return Opened(model, "unified_convnext_micro", "made", None, 32, transform, None)


def broken():
    raise InputError("the file is damaged")


def test_one_broken_model_does_not_stop_the_others(opened, tmp_path, capsys):
    for synset in sets.synsets()[:3]:
        image(tmp_path / "val" / synset / "a.png")
    request = sweep.Request(
        "val", f"{tmp_path}/val", batch_size=8, predictions=f"{tmp_path}/said.csv"
    )
    models = [("one", lambda: opened), ("bad", broken), ("two", lambda: opened)]
    rows = sweep.sweep(models, request, f"{tmp_path}/table.csv")
    assert len(rows) == 3
    table = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    assert list(table[0])[:6] == ["model", "img_size", "top1", "top1_err", "top5", "top5_err"]
    assert [row["model"] for row in table] == ["one", "two", "bad"]
    assert table[2]["error"] == "the file is damaged"
    assert table[0]["crop_pct"] == "0.875"
    said = capsys.readouterr().out
    assert "bad: the file is damaged" in said
    assert "one on val: top-1" in said
    assert compare([f"{tmp_path}/said_one.csv", f"{tmp_path}/said_two.csv"]) == 0
    assert "of 3 images 0 only the first has right, 0 only the second; p = 1" in (
        capsys.readouterr().out
    )
    with pytest.raises(InputError, match="none of 1 models could be evaluated"):
        sweep.sweep([("bad", broken)], request, "")


def test_a_batch_that_does_not_fit_is_halved(opened, tmp_path, monkeypatch, capsys):
    image(tmp_path / sets.synsets()[0] / "a.png")
    real, sizes = sweep.answers, []

    def answers(step, part, transform, mesh, batch_size, *rest):
        sizes.append(batch_size)
        if batch_size > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return real(step, part, transform, mesh, batch_size, *rest)

    monkeypatch.setattr(sweep, "answers", answers)
    request = sweep.Request("a", str(tmp_path), clean=str(tmp_path), batch_size=8)
    metrics, _ = sweep.evaluate_set(opened, request)
    assert sizes == [8, 4, 2, 2]
    assert metrics["top1"] == metrics["clean_top1"] == 100  # of its only class
    assert "memory is out: again with a batch of 4" in capsys.readouterr().out


def test_models_are_found_by_pattern_and_by_folder(tmp_path):
    names = [name for name, _ in sweep.candidates("gcvit_x*,l2vit_t", "")]
    assert names == ["gcvit_xt", "gcvit_xxt", "l2vit_t"]
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert [name for name, _ in sweep.candidates(str(tmp_path), "")] == ["run"]
    with pytest.raises(InputError, match="--models=nothing: no model is called so, and no folder"):
        sweep.candidates("nothing", "")
    with pytest.raises(InputError, match="the folder holds no work directories"):
        sweep.candidates(str(tmp_path / "run"), "")
    (_, opens), *_ = sweep.candidates("gcvit_xxt", str(tmp_path))
    with pytest.raises(InputError, match="gcvit_xxt: there is no .*gcvit_1k_xxtiny"):
        opens()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"set_name": "x"}, "--set=x: expected one of val, real"),
        ({"path": ""}, "--set_path is missing: the folder of --set=val"),
        ({"clean": "there"}, "--clean is for --set=a and r, whose classes are few"),
        ({"batch_size": 0}, "--batch_size=0: expected 1 or more"),
    ],
)
def test_what_cannot_be_asked_for_is_said(fields, message):
    request = sweep.Request("val", "somewhere")._replace(**fields)
    with pytest.raises(InputError, match=re.escape(message)):
        sweep.check(request)


def test_models_of_other_classes_are_refused(opened):
    other = hybrid_flax.create_model("unified_convnext_micro", num_classes=0, **TINY)
    with pytest.raises(InputError, match="has 0 classes that are not called by synset"):
        sweep.class_numbers(opened._replace(model=other))
    assert np.all(list(sweep.class_numbers(opened).values()) == np.arange(1000))
