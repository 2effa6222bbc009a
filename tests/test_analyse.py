import json
import re

import pytest

from hybrid_flax import analyse
from hybrid_flax.analysis import curves, invariance
from hybrid_flax.errors import InputError
from tests import trained


def test_a_study_is_kept_drawn_and_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        invariance, "GRID", {"translate": (0, 4, 64), "rotate_after": (0, 45), "scale": (0.875,)}
    )
    monkeypatch.setattr(analyse, "ERF_IMAGES", 2)
    monkeypatch.setattr(curves, "BUDGETS", (8,))
    monkeypatch.setattr(curves, "PGD_STEPS", 2)
    workdir = trained.write(tmp_path / "run")
    study = analyse.Study(f"{tmp_path}/out", kinds=tuple(invariance.GRID), images=7)
    assert analyse.main(None, workdir, study, given=()) == 0
    assert "plots (PNG) of 1 model(s)" in capsys.readouterr().out
    file = tmp_path / "out" / "run.json"
    found = json.loads(file.read_text())
    assert found["settings"]["images"] == 7
    results = found["results"]
    for still in ("translate 0", "rotate_after 0"):
        assert results[still]["divergence"] == [pytest.approx(0, abs=1e-9)] * 2
        assert results[still]["consistency"] == [100, 0]
    assert results["translate 4"]["divergence"][0] > 0
    assert results["translate 4"]["divergence"][1] > 0  # standard error
    assert "translate 64" not in results  # beyond images of 32 pixels
    for attack in ("fgsm", "pgd"):
        assert results[f"{attack} 8"]["loss"][0] > results[f"{attack} 0"]["loss"][0]
    assert results["erf stage4"]["images"] == 2
    for name in ("invariance.png", "robustness.png", "run_erf.png"):
        assert (tmp_path / "out" / name).stat().st_size > 2000

    del results["translate 4"]
    results["translate 0"]["top1"] = [12.5, 0.0]
    file.write_text(json.dumps(found))
    again = study._replace(what=("invariance",))
    assert analyse.main(None, workdir, again, given=()) == 0
    results = json.loads(file.read_text())["results"]
    assert "translate 4" in results
    assert results["translate 0"]["top1"] == [12.5, 0.0]  # was finished, and not done again
    with pytest.raises(InputError, match=r"run.json holds results of other settings. Give another"):
        analyse.main(None, workdir, again._replace(seed=1), given=())


def test_the_published_directions_are_numpys():
    first = [invariance.published_direction(0, 0, s) for s in range(0, 65, 4)]
    assert first == [4, 5, 0, 3, 3, 3, 1, 3, 5, 2, 4, 6, 0, 0, 4, 2, 1]
    second = [invariance.published_direction(0, 1, s) for s in range(0, 65, 4)]
    assert second == [6, 6, 0, 1, 5, 1, 5, 0, 1, 4, 3, 0, 3, 5, 6, 0, 2]
    with pytest.raises(InputError, match="strength=5: the study has 0, 4, 8"):
        invariance.published_direction(0, 0, 5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"out": ""}, "--out is missing: expected a folder for plots and numbers"),
        ({"what": ("speed",)}, "--what=speed: expected some of invariance, erf, robustness"),
        ({"kinds": ("shear",)}, "--kinds=shear: expected some of translate, rotate_before"),
        ({"images": -1}, "--limit=-1: expected how many images, or 0 for all"),
    ],
)
def test_what_cannot_be_analysed_is_said(tmp_path, fields, message):
    with pytest.raises(InputError, match=re.escape(message)):
        analyse.check(analyse.Study(str(tmp_path))._replace(**fields))


def test_two_runs_of_one_name_are_told_apart():
    assert analyse._run_names(["a/run", "b/run", "c/other"]) == ["run_0", "run_1", "other"]
