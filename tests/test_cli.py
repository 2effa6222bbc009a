"""How programs begin and end, whatever they do."""

import errno
import os
import signal
import sys
import time

import pytest
from absl import flags
from absl.testing import flagsaver

from hybrid_flax import cli
from hybrid_flax.run import supervision

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
QUICKSTART = "--config=configs/quickstart.py"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a program in this process: (its exit status, standard output, standard error)."""

    def app(main, argv, flags_parser):
        sys.exit(main(flags_parser(argv)))

    def run(*arguments, main=lambda config, workdir: 0, **how):
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        monkeypatch.setattr(cli.app, "run", app)
        with flagsaver.flagsaver(), pytest.raises(SystemExit) as end:
            cli.run(main, **how)
        return end.value.code, *capsys.readouterr()

    return run


@pytest.mark.parametrize("asked", ["--help", "-h", "-help", "--helpfull"])
def test_help_lists_all_flags_and_is_no_error(run, asked):
    status, said, errors = run(QUICKSTART, asked, in_parallel=True)
    assert (status, errors) == (0, "")
    for name in ("config", "workdir", "coordinator", "num_processes", "process_id", "peer_timeout"):
        assert f"\n  --{name}: " in said
    assert "all stop. (default: 60)\n" in " ".join(said.split()) + "\n"


def test_help_lists_the_flags_of_the_main_module(monkeypatch, capsys):
    with flagsaver.flagsaver():
        flags.DEFINE_bool("quick", False, "Stop early.", module_name="program")
        monkeypatch.setattr(sys, "argv", ["program"])
        cli._print_help()
    assert "\n  --[no]quick: Stop early.\n" in capsys.readouterr().out.replace(
        " (default: False)", ""
    )


def test_what_cannot_be_written_or_read_is_a_line(run):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/run/metrics.jsonl")

    status, _, said = run(QUICKSTART, "--workdir=x", main=full)
    assert (status, said) == (1, "error: /run/metrics.jsonl: No space left on device\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_any_program_without_a_traceback(run, number):
    def stopped(*_):
        os.kill(os.getpid(), number)
        time.sleep(60)

    status, _, said = run(QUICKSTART, "--workdir=x", main=stopped)
    assert (status, said) == (128 + number, f"stopped by {number.name}\n")


def test_every_program_has_a_watchdog_with_the_limit_of_its_config(run):
    found = []

    def main(*_):
        found.append(supervision._current.watchdog.seconds)

    assert run(QUICKSTART, "--workdir=x", "--config.watchdog_seconds=7", main=main)[0] is None
    assert run(QUICKSTART, "--workdir=x", main=main)[0] is None
    assert found == [7, 900]
    assert supervision._current is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"def get_config(:\n", ", see its line 1: SyntaxError: invalid syntax"),
        (b"\n\nimport nothing_of_that_name\n", ", see its line 3: ModuleNotFoundError: No module"),
        (b"def get_config():\n    return here\n", ", see its line 2: NameError: name 'here' is"),
        (b"def get_config():\n    return {}['a']\n", ", see its line 2: KeyError: 'a'"),
        (b"\xff\xfe", ", see its line 1: SyntaxError: "),
    ],
)
@pytest.mark.parametrize("more", [[], ["--config.epochs=1"]])
def test_a_config_file_that_cannot_be_used_is_named_with_the_line(
    run, tmp_path, content, message, more
):
    file = tmp_path / "config.py"
    file.write_bytes(content)
    status, _, said = run(f"--config={file}", "--workdir=x", *more)
    assert status == 2
    assert said.startswith(f"error: the config file {file} cannot be used{message}")
    assert said.count("\n") == 1


def test_a_pipe_is_no_config_file(run, tmp_path):
    os.mkfifo(tmp_path / "config.py")
    status, _, said = run(f"--config={tmp_path}/config.py", "--workdir=x")
    assert (status, said) == (
        2,
        f"error: --config={tmp_path}/config.py: expected a file, such as configs/gcvit_b.py\n",
    )
