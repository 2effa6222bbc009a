import json
import os
import signal
import subprocess
import sys

import pytest

from hybrid_flax.run.goodput import KINDS, Ledger, account, read_ledger
from hybrid_flax.run.phases import Phases


class Clock:
    """A monotonic clock, and a wall clock that can be set."""

    def __init__(self, wall=1000.0):
        self.now, self.ahead = 0.0, wall

    def sleep(self, seconds):
        self.now += seconds

    def __call__(self):
        return self.now

    def wall(self):
        return self.now + self.ahead


def start(clock, file, restored):
    """What every process does first: 2 s of starting, 1 s of restoring."""
    phases = Phases(clock)
    ledger = Ledger(file, phases, clock.wall)
    clock.sleep(2)
    with phases("restore"):
        clock.sleep(1)
    phases.enter("train")
    ledger.begin(restored)
    return phases, ledger


def steps(clock, phases, count):
    """Each 3 s, and 1 s of waiting for its batch."""
    for _ in range(count):
        with phases("input wait"):
            clock.sleep(1)
        clock.sleep(3)


def test_every_second_belongs_to_one_phase():
    clock = Clock()
    phases = Phases(clock)
    clock.sleep(5)
    phases.enter("train")
    clock.sleep(1)
    with phases("save"):
        clock.sleep(2)
    with phases("input wait"):
        clock.sleep(4)
        phases.was("train")  # the device had work meanwhile
    clock.sleep(1)
    seconds = phases.seconds()
    assert {kind: s for kind, s in seconds.items() if s} == {"start": 5, "train": 6, "save": 2}
    assert phases.silence() == ("train", 1, False)


def test_a_ledger_with_a_known_answer(tmp_path):
    """Two starts: ten steps, of which four are lost by a kill, a pause, and the rest."""
    file, clock = str(tmp_path / "ledger.jsonl"), Clock()
    phases, ledger = start(clock, file, 0)
    with phases("compile"):
        clock.sleep(10)
    steps(clock, phases, 5)
    ledger.write(5)
    with phases("save"):
        clock.sleep(7)
    steps(clock, phases, 5)
    ledger.write(10)
    steps(clock, phases, 1)  # killed before this is written
    with open(file, "a") as stream:
        stream.write('\n{"start": 1, "st')
    clock.sleep(100)
    phases, ledger = start(clock, file, 6)
    steps(clock, phases, 6)
    with phases("evaluate"):
        clock.sleep(8)
    ledger.write(12, finished=True)

    found = ledger.account()
    assert found.seconds == {
        "import": 0,
        "start": 4,
        "build": 0,
        "restore": 2,
        "first batch": 0,
        "compile": 10,
        "first step": 0,
        "train": 12 * 3,  # each step once
        "input wait": 12,
        "save": 7,
        "evaluate": 8,
        "lost steps": 4 * 4,  # 7 to 10
        "downtime": 4 + 100,  # with the step that was never written
    }
    assert found.wall == clock.now
    assert found.goodput == pytest.approx(36 / clock.now)
    assert str(found) == (
        "goodput 18.1 % of 0:03:19 in 2 start(s): start 2.0 %, restore 1.0 %, compile 5.0 %, "
        "train 18.1 %, input wait 6.0 %, save 3.5 %, evaluate 4.0 %, lost steps 8.0 %, "
        "downtime 52.3 %"
    )
    assert account(read_ledger(file)) == found


def test_steps_can_be_lost_more_than_once(tmp_path):
    file, clock = str(tmp_path / "ledger.jsonl"), Clock()
    for restored, reached in ((0, 4), (2, 4), (2, 6), (0, 6)):
        phases, ledger = start(clock, file, restored)
        steps(clock, phases, reached - restored)
        ledger.write(reached)
    found = ledger.account()
    assert found.seconds["train"] == 6 * 3
    assert found.seconds["lost steps"] == (4 + 2 + 4 + 6 - 6) * 4
    assert found.wall == clock.now


def test_steps_that_are_rolled_back_are_lost(tmp_path):
    clock = Clock()
    phases, ledger = start(clock, str(tmp_path / "ledger.jsonl"), 0)
    steps(clock, phases, 4)
    ledger.write(4)
    steps(clock, phases, 1)  # not written before it goes back
    ledger.begin(3)
    steps(clock, phases, 2)
    ledger.write(5)
    found = ledger.account()
    assert (found.seconds["train"], found.seconds["lost steps"]) == (5 * 3, 2 * 4)
    assert (found.wall, found.starts) == (clock.now, 1)


def test_looking_at_a_finished_run_later_is_no_downtime(tmp_path):
    file, clock = str(tmp_path / "ledger.jsonl"), Clock()
    _, ledger = start(clock, file, 0)
    ledger.write(5, finished=True)
    clock.sleep(1e6)
    phases = Phases(clock)
    ledger = Ledger(file, phases, clock.wall)
    ledger.write(5, finished=True)  # without having begun
    assert len(read_ledger(file)) == 2
    _, ledger = start(clock, file, 5)  # its last checkpoint was damaged, say
    assert ledger.account().seconds["downtime"] == 0


def test_of_a_run_without_a_ledger_nothing_is_known():
    assert str(account([])) == "goodput: nothing is known of this run's time"


@pytest.mark.parametrize("jump", [-500.0, 500.0])
def test_a_clock_that_is_set_within_a_run_changes_nothing(tmp_path, jump):
    file, clock = str(tmp_path / "ledger.jsonl"), Clock()
    phases, ledger = start(clock, file, 0)
    steps(clock, phases, 2)
    clock.ahead += jump
    steps(clock, phases, 2)
    ledger.write(4)
    clock.sleep(10)
    _, ledger = start(clock, file, 4)
    assert ledger.account().seconds["downtime"] == 10
    assert ledger.account().wall == clock.now


def test_a_clock_that_goes_back_between_starts_is_said(tmp_path):
    file, clock = str(tmp_path / "ledger.jsonl"), Clock()
    phases, ledger = start(clock, file, 0)
    steps(clock, phases, 2)
    ledger.write(2)
    clock.ahead -= 500
    _, ledger = start(clock, file, 2)
    found = ledger.account()
    assert found.seconds["downtime"] == 0
    assert found.wall == clock.now
    assert str(found).endswith(
        "; the clock went back between two starts, that downtime counts as none"
    )


def test_without_a_file_the_account_is_of_this_process():
    clock = Clock()
    phases, ledger = start(clock, None, 0)
    steps(clock, phases, 3)
    ledger.write(3)
    assert ledger.account().seconds["train"] == 9
    assert set(ledger.account().seconds) == set(KINDS)


KILLED = """
import itertools, sys, time
from hybrid_flax.run.goodput import Ledger, Phases
phases = Phases()
ledger = Ledger(sys.argv[1], phases)
phases.enter("train")
ledger.begin(0)
for step in itertools.count(1):
    with phases("input wait"):
        time.sleep(0.01)
    time.sleep(0.02)
    ledger.write(step)
    print(step, flush=True)
"""


def test_the_ledger_of_a_killed_process_sums_to_the_wall_time(tmp_path):
    file = tmp_path / "ledger.jsonl"
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(file)], stdout=subprocess.PIPE, text=True
        )
        while int(process.stdout.readline()) < 20:
            pass
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    ledger = Ledger(str(file), Phases())
    ledger.begin(0)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [lines[0]["start"], lines[-1]["start"]] == [1, 3]
    found = ledger.account()
    began = lines[0]["time"] - lines[0]["elapsed"]
    assert found.wall == pytest.approx(lines[-1]["time"] - began, abs=0.05)
    assert found.seconds["train"] == 0  # all was lost: the third start is at step 0
    assert found.seconds["lost steps"] == pytest.approx(
        sum(sum(line["seconds"].values()) for line in lines if line["step"]), abs=0.01
    )


def test_a_damaged_ledger_is_summed_up_as_far_as_it_can_be_read(tmp_path, caplog):
    file, clock = tmp_path / "ledger.jsonl", Clock()
    phases, ledger = start(clock, str(file), 0)
    steps(clock, phases, 2)
    ledger.write(2)
    first, *_ = file.read_bytes().splitlines(keepends=True)
    for damaged in (
        b"\xff\xfe\n",
        b"[]\n",
        b'{"step": 1}\n',
        first.replace(b'"time": 1', b'"time": "1'),
        first.replace(b"start", b"stort"),
        b'{"step": ' + b"1" * 5000 + b"}\n",
        b"[" * 100_000 + b"\n",
    ):
        caplog.clear()
        file.write_bytes(damaged + first)
        assert account(read_ledger(file)).wall == 3
        assert f"{file}: 1 of its lines are damaged and left out: 1" in caplog.text
