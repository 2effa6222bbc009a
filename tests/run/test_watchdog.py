import re
import signal
import subprocess
import sys
import threading
import time

from hybrid_flax.run.phases import Phases
from hybrid_flax.run.watchdog import Watchdog

STALLING = """
import sys, time
from hybrid_flax.run.watchdog import Watchdog
from hybrid_flax.run.goodput import Phases

def hang():
    time.sleep(60)

phases = Phases()
with Watchdog(phases, seconds=0.5, file=sys.argv[2]):
    phases.enter("train")
    for _ in range(8):  # longer than the limit, with signs of progress
        with phases("save"):
            time.sleep(0.1)
    with phases("evaluate"):
        for _ in range(8):
            time.sleep(0.1)
            phases.alive()
    if sys.argv[1] == "train":
        hang()
    with phases(sys.argv[1]):
        hang()
"""


def stall(phase, file):
    """A process that hangs there, and what it said before it ended."""
    process = subprocess.Popen(
        [sys.executable, "-c", STALLING, phase, str(file)], stderr=subprocess.PIPE, text=True
    )
    return process, process.communicate(timeout=60)[1]


def test_a_stalled_process_says_where_it_hangs_and_ends(tmp_path):
    for phase, limit in (("train", "0.5"), ("save", "0.5"), ("compile", "2")):
        file = tmp_path / f"{phase}.txt"
        file.write_text("an earlier one\n")
        process, said = stall(phase, file)
        assert process.returncode == 124, said
        where = rf"stalled. Process {process.pid} on .* has been in phase '{phase}' for \d+ s"
        for text in (said, file.read_text()):
            assert re.search(where, text)
            assert f"{limit} s are allowed (--config.watchdog_seconds)" in text
            assert re.search(r"line \d+ in hang", text)
            assert "memory in use on the devices: not known" in text
        assert file.read_text().startswith("an earlier one\n")


def test_a_file_that_cannot_be_written_does_not_keep_it_from_ending(tmp_path):
    process, said = stall("train", tmp_path / "nowhere" / "stall.txt")
    assert process.returncode == 124
    assert "in phase 'train'" in said


STOPPED = """
import time
from hybrid_flax.run.watchdog import Watchdog
from hybrid_flax.run.phases import Phases
phases = Phases()
with Watchdog(phases, seconds=1):
    phases.alive()
    print("begun", flush=True)
    end = time.monotonic() + 4
    while time.monotonic() < end:
        time.sleep(0.05)
        phases.alive()
"""


def test_a_process_that_was_stopped_and_goes_on_is_not_stalled():
    with subprocess.Popen(
        [sys.executable, "-c", STOPPED], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(2.5)
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=60) == 0


def test_nothing_is_written_through_a_link(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "stall-0.txt").symlink_to(tmp_path / "mine.txt")
    process, said = stall("train", tmp_path / "stall-0.txt")
    assert process.returncode == 124
    assert "in phase 'train'" in said
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_the_watchdog_leaves_with_the_run():
    before = threading.active_count()
    phases = Phases()
    with Watchdog(phases, seconds=30):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


def test_silence_grows_until_a_sign():
    clock = iter(range(100))
    phases = Phases(lambda: next(clock))
    phases.enter("train")  # at 1
    assert phases.silence() == ("train", 1, True)
    phases.alive()  # at 3
    assert phases.silence() == ("train", 1, False)
