import jax
import jax.numpy as jnp
import pytest

from hybrid_flax.run.profiling import Profile


@pytest.mark.parametrize("steps", ["10", "15:10", "0:3", "-1:3", "a:b", "10:15:20"])
def test_unusable_steps_are_named(steps, tmp_path):
    with pytest.raises(ValueError) as error:
        Profile(steps, str(tmp_path))
    assert str(error.value) == (
        f"--profile={steps}: expected the first and the last step to record, counted from 1, such "
        "as 10:15"
    )


@pytest.mark.parametrize(
    ("steps", "begins_after", "recorded"),
    [
        ("2:3", 0, [2, 3]),
        ("2:3", 2, [3]),  # a run that continues within them
        ("2:3", 3, []),
        ("", 0, []),
        ("4:9", 0, [4, 5]),  # the run ends first
    ],
)
def test_the_steps_asked_for_are_recorded(tmp_path, monkeypatch, steps, begins_after, recorded):
    running, found = [], []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: running.append(folder))
    monkeypatch.setattr(jax.profiler, "stop_trace", running.clear)
    profile = Profile(steps, str(tmp_path / "profile"))
    for number in range(begins_after + 1, 6):
        with profile.step(number):
            if running:
                found.append(number)
        profile.after(number, jnp.zeros(3))
    profile.close()
    assert found == recorded
    assert not running


def test_a_record_holds_the_annotated_steps(tmp_path, capsys):
    profile = Profile("2:3", str(tmp_path / "profile"))
    work = jax.jit(lambda x: x @ x)
    for number in range(1, 5):
        with profile.step(number):
            result = work(jnp.eye(8))
        profile.after(number, result)
    (record,) = (tmp_path / "profile").rglob("*.xplane.pb")
    assert b"step_num" in record.read_bytes()
    assert f"recorded steps 2 to 3 in {tmp_path}/profile" in capsys.readouterr().out


def test_steps_that_were_not_done_are_said(tmp_path, caplog):
    profile = Profile("50:60", str(tmp_path))
    with profile.step(3):
        pass
    profile.close()
    assert "--profile=50:60 recorded nothing: none of these steps was done" in caplog.text
