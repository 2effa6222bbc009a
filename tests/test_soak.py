"""The soak in small: two processes, one kill. `make soak` is the real one."""

import subprocess
import sys


def test_a_killed_process_ends_the_other_and_changes_no_bit():
    done = subprocess.run(
        [sys.executable, "-m", "tests.soak", "--kills=1", "--seed=1"],
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "; the other ended after" in done.stdout
    assert "arrays that differ from the undisturbed run: none" in done.stdout
