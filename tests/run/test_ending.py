import io
import os
import subprocess
import sys

import pytest

from hybrid_flax.errors import InputError
from hybrid_flax.run.ending import ending
from hybrid_flax.run.supervision import supervised


def test_a_program_without_signs_of_life_is_not_limited():
    seen = []

    def program():
        with supervised() as watch:
            seen.append(watch.watchdog.seconds)

    assert not ending(program, limited=False)
    assert not ending(program)
    assert seen[0] == 0 < seen[1]


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (InputError("--x=1: no"), 2, "error: --x=1: no\n"),
        (PermissionError(13, "Permission denied", "f"), 1, "error: f: Permission denied\n"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, error, status, said):
    def program():
        raise error

    assert ending(program) == status
    assert capsys.readouterr().err == said


def test_help_into_a_closed_pipe_is_one_line(monkeypatch, capsys):
    class Closed(io.StringIO):
        def flush(self):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Closed())
    assert ending(lambda: sys.exit(0)) == 1
    assert capsys.readouterr().err == "error: standard output: Broken pipe\n"


def run(program, **environment):
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_devices_that_are_not_there_are_one_line():
    program = "import jax; from hybrid_flax.run.ending import ending; exit(ending(jax.devices))"
    found = run(program, JAX_PLATFORMS="nosuch")
    assert found.returncode == 2
    assert found.stderr.startswith("error: JAX has no devices with JAX_PLATFORMS=nosuch: Unable to")
    assert found.stderr.count("\n") == 1


def test_it_needs_jax_and_little_else():
    others = "{'absl', 'orbax', 'grain', 'torch'}"
    found = run(f"import sys, hybrid_flax.run.ending; print({others} & {{*sys.modules}})")
    assert found.stdout == "set()\n"
