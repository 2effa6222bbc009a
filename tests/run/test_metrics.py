import errno
import json
import os

import pytest
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from hybrid_flax.run.metrics import MetricWriter, draw_curves, read_metrics
from hybrid_flax.run.phases import Phases
from hybrid_flax.run.progress import Progress


def test_records_are_lines_of_json_and_tensorboard_events(tmp_path):
    file = tmp_path / "metrics.jsonl"
    writer = MetricWriter(str(tmp_path), str(file), start_step=0)
    writer.write(1, **{"train/loss": 2.5})
    writer.write(2, **{"train/loss": 2.0, "val/top1": 50.0})
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines == [
        {"step": 1, "train/loss": 2.5},
        {"step": 2, "train/loss": 2.0, "val/top1": 50.0},
    ]
    assert read_metrics(file) == lines
    (events,) = tmp_path.glob("events.out.tfevents*")
    assert _scalars(events) == [
        (1, "train/loss", 2.5),
        (2, "train/loss", 2.0),
        (2, "val/top1", 50.0),
    ]


def _scalars(file):
    """(step, name, value) of an event file."""
    return [(e.step, v.tag, v.simple_value) for e in _events(file) for v in e.summary.value]


def _events(file):
    """Records of length, checksum, content, checksum."""
    data, events = file.read_bytes(), []
    while data:
        length = int.from_bytes(data[:8], "little")
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return events


def test_a_resumed_run_drops_what_it_will_record_again(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 5, "a": 1}\n{"step": 10, "a": 2}\n{"step": 15, "a": 3}\n{"step": 2')
    writer = MetricWriter(str(tmp_path), str(file), start_step=10)
    assert [record["step"] for record in writer.records] == [5, 10]
    writer.write(15, a=4.0)
    assert read_metrics(file) == [
        {"step": 5, "a": 1},
        {"step": 10, "a": 2},
        {"step": 15, "a": 4.0},
    ]


def test_tensorboard_drops_what_comes_again(tmp_path):
    file = str(tmp_path / "metrics.jsonl")
    MetricWriter(str(tmp_path), file, start_step=7)
    assert not list(tmp_path.glob("events*"))  # a finished run that is looked at
    MetricWriter(str(tmp_path), file, start_step=7).write(8, a=1.0)
    (events,) = tmp_path.glob("events.out.tfevents*")
    version, begin, written = _events(events)
    assert version.file_version == "brain.Event:2"
    assert (begin.step, begin.session_log.status) == (8, begin.session_log.START)
    assert written.step == 8


def test_a_damaged_file_is_kept_and_what_can_be_read_is_used(tmp_path, caplog):
    file = tmp_path / "metrics.jsonl"
    damaged = b'{"step": 1, "a": 1}\n{"step": 2\n[]\n\xff\n{"a": 1}\n{"step": 3, "a": "x"}\n'
    file.write_bytes(damaged + b'{"step": 9, "a": 2}\n{"st')
    writer = MetricWriter(str(tmp_path), str(file), start_step=10)
    assert writer.records == [{"step": 1, "a": 1}, {"step": 9, "a": 2}]
    assert f"{file}: 5 of its lines are damaged and left out: 2, 3, 4, …" in caplog.text
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes().startswith(damaged)
    caplog.clear()
    assert read_metrics(file) == writer.records
    assert not caplog.records


def test_a_line_that_does_not_fit_leaves_no_half_of_it(tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    writer = MetricWriter(str(tmp_path), str(file), start_step=0)
    writer.write(1, a=1.0)
    write = os.write

    def full(descriptor, data):
        if len(data) < 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[:10])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space left on device") as error:
            writer.write(2, a=2.0)
    assert error.value.filename == str(file)
    assert file.read_text() == '{"step": 1, "a": 1.0}\n'


def test_there_may_be_no_metrics_yet(tmp_path):
    assert read_metrics(tmp_path / "nothing.jsonl") == []


def test_curves_are_drawn_with_and_without_an_average(tmp_path):
    records = [{"step": s, "train/loss": 3 - s / 10} for s in range(10)]
    records += [{"step": 5, "val/top1": 50.0, "val/loss": 2.0}]
    draw_curves(records, str(tmp_path / "a.png"), "a title")
    draw_curves([], str(tmp_path / "b.png"), "nothing yet")
    for name in ("a.png", "b.png"):
        with Image.open(tmp_path / name) as picture:
            assert picture.width > 800
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "b.png"]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def running():
    """A clock, and phases after 30 s of compiling the first step, which waited 9 s for images."""
    clock = Clock()
    phases = Phases(clock)
    phases.enter("train")
    return clock, phases


def first_step(progress, clock, phases):
    with phases("input wait"):
        clock.now += 9
    with phases("compile"):
        clock.now += 30
    progress.stepped()


def step(progress, clock, phases):
    with phases("input wait"):
        clock.now += 0.5
    clock.now += 1.5
    progress.stepped()


def test_speed_counts_steps_but_neither_the_first_nor_pauses(running, capsys):
    progress = Progress(running[1], batch_size=10, step=0, total_steps=100)
    first_step(progress, *running)
    for _ in range(4):
        step(progress, *running)
    with running[1]("evaluate"):
        running[0].now += 1000
    with running[1]("save"):
        running[0].now += 3
    assert progress.report(5, 0.25) == {
        "seconds_per_step": 2.0,
        "images_per_second": 5.0,
        "input_wait": 0.25,
        "checkpoint_seconds": 3.0,
    }
    assert (
        "step 5/100: loss 0.2500, 5 images/s, 2 s/step, input wait 25%, saving 3.0 s, 0:03:10 left"
        in capsys.readouterr().out
    )
    assert progress.report(5, 0.25) == {}  # no step since
    progress.close()


def test_of_several_processes_the_one_that_waits_longest_is_named(running, capsys):
    progress = Progress(running[1], batch_size=10, step=0, total_steps=9)
    first_step(progress, *running)
    step(progress, *running)
    speeds = progress.report(2, 1.0, [0.5, 1.25, 0.0])
    assert (speeds["slowest_process"], speeds["slowest_input_wait"]) == (1, 1.25)
    step(progress, *running)
    progress.report(3, 1.0, [0.05, 0.0, 0.0])  # nothing to speak of
    said = capsys.readouterr().out.splitlines()
    assert "input wait 25%, process 1 waited 1.2 s for input, 0:00:14 left" in said[-2]
    assert "process" not in said[-1]
    progress.close()


def test_utilisation_is_the_share_of_the_least_time_a_step_could_take(running, capsys):
    progress = Progress(running[1], batch_size=10, step=7, total_steps=9, seconds_at_peak=0.5)
    first_step(progress, *running)
    assert progress.report(8, 1.0) == {}  # it compiled
    step(progress, *running)
    assert progress.report(9, 1.0)["mfu"] == 0.25
    assert "input wait 25%, MFU 25%, 0:00:00 left" in capsys.readouterr().out
    progress.close()
