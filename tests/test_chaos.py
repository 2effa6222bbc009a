"""The chaos run in small: one fault of each kind. `make chaos` is the real one."""

import re
import subprocess
import sys

from tests.chaos import DAMAGES, STOPS, plan


def test_one_fault_of_each_kind_changes_no_bit():
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos", "--faults=9", "--seed=1"],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    said = done.stdout
    assert done.returncode == 0, said + done.stderr
    assert "arrays that differ from the undisturbed run: none" in said
    for kind in STOPS + DAMAGES:
        assert re.search(rf"^ +1  {kind}$", said, flags=re.MULTILINE), said


def test_a_plan_has_all_kinds_in_equal_shares_and_follows_from_its_seed():
    faults = plan(300, steps=600, seed=3)
    assert faults == plan(300, steps=600, seed=3)
    assert faults != plan(300, steps=600, seed=4)
    assert len(faults) + sum(fault.damage is not None for fault in faults) == 300
    for kind in STOPS:
        assert 33 <= sum(fault.stop == kind for fault in faults) <= 34
    for kind in DAMAGES:
        assert 33 <= sum(fault.damage == kind for fault in faults) <= 34
    steps = [fault.step for fault in faults if fault.step is not None]
    assert steps == sorted(steps)
    assert steps[-1] < 600
