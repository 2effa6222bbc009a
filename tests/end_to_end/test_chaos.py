"""Chaos and soak in small. `make chaos` and `make soak` are the real ones."""

import re
import subprocess
import sys

import pytest

from tests.chaos import DAMAGES, STOPS, plan


def run(*arguments):
    """What it printed, of a run that changed nothing."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "arrays that differ from the undisturbed run: none" in done.stdout
    return done.stdout


@pytest.mark.slow
def test_one_fault_of_each_kind_changes_no_bit():
    said = run("tests.chaos", "--faults=10", "--seed=1")
    for kind in STOPS + DAMAGES:
        assert re.search(rf"^ +1  {kind}$", said, flags=re.MULTILINE), said


@pytest.mark.slow
def test_a_killed_process_ends_the_other_and_changes_no_bit():
    assert "; the other ended after" in run("tests.soak", "--kills=1", "--seed=1")


def test_a_plan_has_all_kinds_in_equal_shares_and_follows_from_its_seed():
    faults = plan(300, steps=600, seed=3)
    assert faults == plan(300, steps=600, seed=3)
    assert faults != plan(300, steps=600, seed=4)
    assert len(faults) + sum(fault.damage is not None for fault in faults) == 300
    for kind in STOPS:
        assert sum(fault.stop == kind for fault in faults) == 30
    for kind in DAMAGES:
        assert sum(fault.damage == kind for fault in faults) == 30
    steps = [fault.step for fault in faults if fault.step is not None]
    assert steps == sorted(steps)
    assert steps[-1] < 600
