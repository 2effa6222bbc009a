import pytest

from tests import trials
from tests.trial_inputs import KINDS

QUICK = 12  # inputs of each kind; the others with `make test-all`


@pytest.mark.parametrize("kind", KINDS)
def test_odd_inputs_are_used_or_refused_by_name(kind, tmp_path):
    for number in range(QUICK):
        folder = tmp_path / str(number)
        folder.mkdir()
        found, why = trials.outcome(kind, number, 1, folder)
        assert found != trials.FAILED, f"number {number}: {why}"


@pytest.mark.slow
def test_none_of_three_thousand_fails(capsys):
    assert trials.main(["--inputs=3000"]) == 0, capsys.readouterr().out


def test_a_failure_is_counted_named_and_not_the_end(monkeypatch):
    def odd(seed, folder):
        def use():
            if seed.endswith("/1"):
                raise KeyError("no")

        return trials.Trial(use, ("x",))

    monkeypatch.setitem(KINDS, "images", odd)
    assert trials.outcome("images", 0, 0, None) == (trials.USED, "")
    found, why = trials.outcome("images", 1, 0, None)
    assert found == trials.FAILED
    assert why.startswith("KeyError at test_trials.py:")
