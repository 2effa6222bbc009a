import logging
import os
import pathlib
import random
import shutil
import sys
import tempfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from orbax.checkpoint.experimental.v1._src.saving import execution

from hybrid_flax.errors import InputError
from hybrid_flax.run import checkpoint_files, orbax_io
from hybrid_flax.run.checkpoint_files import FORMAT, CheckpointMismatchError
from hybrid_flax.run.checkpoints import Checkpoints, CheckpointSaveError, main
from hybrid_flax.run.saved_weights import load_weights
from hybrid_flax.run.storage.folder_steps import FolderSteps
from hybrid_flax.weights.paths import flatten, unflatten_like

FORMATS = pathlib.Path(__file__).parents[1] / "golden" / "checkpoints"


def tree(seed=0, rows=300):
    rng = np.random.default_rng(seed)
    params = {
        "stem": {"kernel": rng.normal(size=(8, 16)).astype(np.float32)},
        "stages": {
            "0": {"scale": rng.normal(size=(64,)).astype(np.float32)},
            "1": {"scale": rng.normal(size=(64,)).astype(np.float32)},
            "10": {"table": rng.normal(size=(rows, 70)).astype(ml_dtypes.bfloat16)},
        },
    }
    optimizer = optax.adamw(1e-3).init(jax.tree.map(jnp.asarray, params))
    return {"step": np.int32(7), "params": params, "opt_state": optimizer}


def small():
    return {"step": np.int32(7)}


def assert_restores(restored, step, want):
    assert restored is not None
    assert restored[0] == step
    arrays, want = restored[1], flatten(want)
    assert arrays.keys() == want.keys()
    for path, leaf in want.items():
        assert arrays[path].dtype == np.asarray(leaf).dtype, path
        assert arrays[path].tobytes() == np.asarray(leaf).tobytes(), path


@pytest.fixture
def saved(tmp_path):
    """Steps 10, 20 and 30, each with other numbers."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (10, 20, 30):
        checkpoints.save(step, tree(step), {"model": "x"})
    checkpoints.wait()
    return checkpoints


def test_what_was_saved_comes_back_to_the_bit(saved):
    assert saved.steps() == [10, 20, 30]
    restored = saved.restore(tree())
    assert_restores(restored, 30, tree(30))
    assert restored[2] == {"model": "x"}
    again = unflatten_like(tree(), restored[1])
    assert type(again["opt_state"]) is type(tree()["opt_state"])


def test_an_empty_folder_has_nothing_to_restore(tmp_path):
    assert Checkpoints(tmp_path / "nowhere").restore() is None
    assert Checkpoints(tmp_path / "nowhere").steps() == []


def test_only_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for step in range(1, 6):
        checkpoints.save(step, tree(), {})
    checkpoints.wait()
    assert checkpoints.steps() == [4, 5]


def test_milestones_and_the_best_are_kept_besides(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1, keep_every_steps=4, keep_best=2)
    scores = {1: 70.0, 2: 80.0, 3: 75.0, 5: 60.0, 6: 80.0, 7: 75.0}
    best = []
    for step in range(1, 8):
        checkpoints.save(step, small(), {})
        if step in scores and checkpoints.rate(step, scores[step]):
            best.append(step)
    checkpoints.save(7, small(), {})
    assert checkpoints.steps() == [2, 4, 6, 7]  # the best are 2 and 6
    assert best == [1, 2, 3, 6]
    later = Checkpoints(tmp_path / "checkpoints", keep=1, keep_best=1)
    assert later.rate(6, 80.0)  # as a run that continues notes what it had evaluated
    assert later.rate(2, 80.0)  # of equals the earlier
    later.save(8, small(), {})
    later.wait()
    assert later.steps() == [2, 8]


def test_a_checkpoint_that_cannot_be_deleted_does_not_stop_training(saved, monkeypatch, caplog):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    def refuse_to(operation):
        """From when the next step is written until the old ones are deleted."""
        path = type(saved.directory)
        monkeypatch.setattr(
            FolderSteps, "finish", lambda *_: monkeypatch.setattr(path, operation, refuse)
        )

    refuse_to("rename")
    saved.save(40, small(), {})
    saved.wait()
    assert saved.steps() == [10, 20, 30, 40]
    assert f"cannot delete {saved.directory}/10: [Errno 13] Permission denied" in caplog.text
    monkeypatch.undo()
    refuse_to("rmtree")
    saved.save(50, small(), {})
    saved.wait()
    assert saved.steps() == [30, 40, 50]  # half deleted ones go by another name
    assert f"cannot delete {saved.directory}/10.deleted: [Errno 13]" in caplog.text
    monkeypatch.undo()
    saved.clear_after(50)
    assert sorted(path.name for path in saved.directory.iterdir()) == ["30", "40", "50"]


def test_the_only_intact_checkpoint_is_not_deleted(tmp_path, monkeypatch, caplog):
    def damage(self, step):
        (self.folder / str(step) / "manifest" / "data.json").unlink()

    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    checkpoints.save(1, small(), {})
    checkpoints.wait()
    monkeypatch.setattr(FolderSteps, "finish", damage)
    checkpoints.save(2, small(), {})
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]
    assert f"checkpoint {checkpoints.directory / '2'} is damaged" in caplog.text
    assert "Older ones are kept" in caplog.text
    assert checkpoints.restore()[0] == 1


def test_a_disk_too_small_for_the_checkpoints_is_noticed_first(tmp_path, monkeypatch, caplog):
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", keep=2, keep_best=1)
    state = {"params": jax.ShapeDtypeStruct((2**18, 5), jnp.float32), "step": np.int32(0)}
    each = 5 * 2**20 + 4

    def left(count):
        usage = shutil.disk_usage(tmp_path)._replace(free=count)
        monkeypatch.setattr("hybrid_flax.run.checkpoints.shutil.disk_usage", lambda _: usage)
        checkpoints.check_space(state)
        monkeypatch.undo()

    left(4 * each)
    assert not caplog.records
    left(4 * each - 1)
    assert (
        "the disk has 20.0 MiB (20,971,535 bytes) left, and up to 4 more checkpoints of 5.0 MiB "
        "(5,242,884 bytes) each will be there at the same time. Free some, or lower "
        "--config.checkpoint.keep" in caplog.text
    )
    with pytest.raises(InputError) as error:
        left(each - 1)
    assert str(error.value) == (
        f"{checkpoints.directory}: a checkpoint of this run takes 5.0 MiB (5,242,884 bytes), the "
        "disk has 5.0 MiB (5,242,883 bytes) left. Free some, or choose another --workdir"
    )


def test_a_relative_path_will_do(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_restores(Checkpoints("checkpoints").restore(), 30, tree(30))
    assert load_weights("").step == 30


def test_saving_copies_before_the_buffers_are_reused(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    state = tree()
    want = jax.tree.map(np.array, state)
    checkpoints.save(1, state, {})
    state["params"]["stem"]["kernel"][:] = 0
    checkpoints.wait()
    assert_restores(checkpoints.restore(), 1, want)


# ------------------------------------------------------------------------------------ damage


def files_of(checkpoints, step):
    folder = pathlib.Path(checkpoints.directory) / str(step)
    return sorted(file for file in folder.rglob("*") if file.is_file())


def flip(file, rng):
    data = bytearray(file.read_bytes())
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data)


def truncate(file, rng):
    os.truncate(file, rng.randrange(file.stat().st_size) if file.stat().st_size else 0)


def delete(file, rng):
    file.unlink()


@pytest.mark.parametrize("damage", [flip, truncate, delete])
def test_no_damage_is_ever_loaded(saved, tmp_path, damage, caplog):
    """Every file of the newest step: either it does not matter, or it is noticed."""
    copy = tmp_path / "copy"
    newest = pathlib.Path(saved.directory) / "30"
    shutil.copytree(newest, copy)
    rng = random.Random(0)
    noticed = 0
    for file in files_of(saved, 30):
        for _ in range(2 if damage is flip else 1):
            damage(file, rng)
            caplog.clear()
            restored = saved.restore(tree())
            if restored[0] == 30:
                assert_restores(restored, 30, tree(30))
            else:
                assert_restores(restored, 20, tree(20))
                assert f"checkpoint {newest} is damaged" in caplog.text
                assert "going back to the intact checkpoint of step 20" in caplog.text
                noticed += 1
            shutil.rmtree(newest)
            shutil.copytree(copy, newest)
    assert noticed > 4


def test_a_flipped_bit_in_an_array_is_named(saved, caplog):
    """Orbax itself loads such a checkpoint without a word."""
    rng = random.Random(1)
    data = [file for file in files_of(saved, 30) if file.parent.name == "d"]
    largest = max(data, key=lambda file: file.stat().st_size)
    named = 0
    for _ in range(5):
        content = largest.read_bytes()
        flip(largest, rng)
        caplog.clear()
        assert saved.restore()[0] == 20
        named += "differs from what was saved" in caplog.text
        largest.write_bytes(content)
    assert named


def test_swapped_arrays_are_noticed(saved, caplog):
    """Two arrays of equal shape change places: every file is intact, the tree is not."""
    state = tree(30)
    scales = state["params"]["stages"]
    scales["0"], scales["1"] = scales["1"], scales["0"]
    other = Checkpoints(saved.directory.parent / "other")
    other.save(30, state, {"model": "x"})
    other.wait()
    shutil.rmtree(saved.directory / "30" / "state")
    shutil.copytree(other.directory / "30" / "state", saved.directory / "30" / "state")
    assert_restores(saved.restore(tree()), 20, tree(20))
    for index in "01":
        path = f"params/stages/{index}/scale"
        assert f"array {path} differs from what was saved" in caplog.text


def test_a_step_under_another_name_is_noticed(saved, caplog):
    shutil.copytree(saved.directory / "10", saved.directory / "40")
    assert saved.restore()[0] == 30
    assert "it is of step 10" in caplog.text


def test_what_an_interrupted_save_leaves_is_no_checkpoint(saved):
    for name in ("40.orbax-checkpoint-tmp", "40.probe"):
        shutil.copytree(saved.directory / "30", saved.directory / name)
    assert saved.steps() == [10, 20, 30]
    assert saved.restore()[0] == 30
    saved.clear_after(30)
    assert sorted(path.name for path in saved.directory.iterdir()) == ["10", "20", "30"]


def test_what_a_run_did_not_make_is_left_alone(saved):
    folder = saved.directory
    shutil.copytree(folder / "10", folder / "10-good")
    (folder / "2024").mkdir()
    (folder / "2024" / "plan.txt").write_text("mine")
    (folder / "README").write_text("mine")
    (folder / "40").write_text("mine")
    for name in ("notes", "007", "٣", "30.good", "my.orbax-checkpoint-tmp", "x.deleted"):
        (folder / name).mkdir()
    before = {path.name for path in folder.iterdir()}
    (folder / "50.orbax-checkpoint-tmp-1234").mkdir()
    (folder / "7.deleted").mkdir()
    assert saved.steps() == [10, 20, 30]
    assert saved.restore()[0] == 30
    saved.clear_after(30)
    assert {path.name for path in folder.iterdir()} == before
    saved.save(45, small(), {})
    saved.wait()
    assert {path.name for path in folder.iterdir()} == before - {"10"} | {"45"}


def test_a_checkpoint_that_is_deleted_while_it_is_read_is_not_damaged(saved, monkeypatch, caplog):
    read = checkpoint_files.read_step

    def deleted(folder, step, *rest):
        if step == 30:  # as the run does it that goes on
            folder.rename(folder.with_name("30.deleted"))
        return read(folder, step, *rest)

    monkeypatch.setattr("hybrid_flax.run.checkpoints.read_step", deleted)
    assert saved.restore()[0] == 20
    assert "damaged" not in caplog.text


def test_what_may_not_be_read_is_not_damaged(saved, monkeypatch):
    access = os.access
    theirs = str(saved.directory / "30" / "manifest" / "data.json")
    monkeypatch.setattr(os, "access", lambda path, how: path != theirs and access(path, how))
    with pytest.raises(InputError, match=f"{theirs} may not be read. That says nothing about"):
        saved.restore()
    assert saved.steps() == [10, 20, 30]


def test_damaged_ones_do_not_replace_each_other(saved):
    for content in ("first", "second"):
        (saved.directory / "40" / "state").mkdir(parents=True)
        (saved.directory / "40" / "content").write_text(content)
        saved.clear_after(30)
    damaged = saved.directory.parent / "damaged"
    assert (damaged / "40" / "content").read_text() == "first"
    assert (damaged / "40-2" / "content").read_text() == "second"


def test_damaged_steps_make_room_for_new_ones(saved, caplog):
    (saved.directory / "30" / "manifest" / "data.json").unlink()
    step, *_ = saved.restore()
    saved.clear_after(step)
    assert saved.steps() == [10, 20]
    assert (saved.directory.parent / "damaged" / "30").is_dir()
    assert "moved the damaged checkpoint of step 30" in caplog.text
    saved.save(30, tree(5), {})
    saved.wait()
    assert_restores(saved.restore(), 30, tree(5))


def test_when_all_are_damaged_each_reason_is_given(saved):
    for step in saved.steps():
        (saved.directory / str(step) / "manifest" / "data.json").unlink()
    with pytest.raises(ValueError, match="every checkpoint in .* is damaged") as error:
        saved.restore()
    for step in (10, 20, 30):
        assert f"step {step}: its manifest cannot be read" in str(error.value)


def test_another_model_is_refused_with_every_difference(saved):
    expected = tree()
    expected["params"]["stem"]["kernel"] = np.zeros((8, 17), np.float32)
    expected["params"]["stages"]["10"]["table"] = np.zeros((300, 70), np.float32)
    expected["params"]["head"] = {"bias": np.zeros(3, np.float32)}
    del expected["step"]
    with pytest.raises(CheckpointMismatchError, match="of another model or optimizer") as error:
        saved.restore(expected)
    text = str(error.value)
    assert "4 differences" in text
    assert "1 only in the checkpoint:\n    step" in text
    assert "1 missing from the checkpoint:\n    params/head/bias" in text
    assert "params/stem/kernel: there float32 (8, 16), here float32 (8, 17)" in text
    assert "params/stages/10/table: there bfloat16 (300, 70), here float32 (300, 70)" in text


def test_a_newer_format_asks_for_an_update(saved, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "FORMAT", 0)
    with pytest.raises(ValueError, match="checkpoint format 1; .*reads up to 0. Update"):
        saved.restore()


@pytest.mark.parametrize("number", range(1, FORMAT + 1))
def test_checkpoints_of_every_format_can_be_read(number):
    """What `python -m tests.run.test_checkpoints` wrote when the format was new."""
    restored = Checkpoints(FORMATS / str(number)).restore(tree(rows=3))
    assert_restores(restored, 7, tree(7, rows=3))
    assert restored[2] == {"model": "x", "format": number}


# ------------------------------------------------------------------------------ failing saves


def test_a_folder_that_cannot_be_written_fails_at_once(tmp_path):
    (tmp_path / "file").write_text("in the way")
    checkpoints = Checkpoints(tmp_path / "file" / "checkpoints")
    with pytest.raises(CheckpointSaveError, match=r"step 5 could not be written .*Not a directory"):
        checkpoints.save(5, tree(), {})


def test_a_save_that_fails_in_the_background_is_raised_by_the_next(saved, monkeypatch):
    class Failing:
        def result(self):
            raise OSError("No space left on device")

    monkeypatch.setattr(orbax_io, "save_async", lambda *_: Failing())
    saved.save(40, tree(), {})
    with pytest.raises(CheckpointSaveError, match="step 40 .*No space left.*there is of step 30"):
        saved.save(50, tree(), {})


def test_orbax_is_left_as_it_was(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(
        execution, "_check_directory_consistency", lambda directory: called.append(directory)
    )
    mine = execution._check_directory_consistency
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    checkpoints.save(1, small(), {})
    assert execution._check_directory_consistency is mine
    checkpoints.wait()
    checkpoints.restore()
    assert execution._check_directory_consistency is mine
    assert not called  # other processes are not asked


def test_weights_of_a_run_come_apart(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    weights = {"params": tree()["params"], "batch_stats": {"mean": np.zeros(3)}}
    checkpoints.save(3, weights | {"ema": weights, "step": np.int32(3)}, {"model": "x"})
    checkpoints.wait()
    saved = load_weights(str(tmp_path))
    assert saved.step == 3
    assert saved.trained.keys() == saved.averaged.keys() == flatten(weights).keys()
    with pytest.raises(ValueError, match="there is no checkpoint in .*nowhere/checkpoints; give"):
        load_weights(str(tmp_path / "nowhere"))


def test_loading_says_nothing_when_all_is_well(saved, caplog):
    with caplog.at_level(logging.WARNING):
        saved.restore(tree())
    assert not caplog.records


def test_a_file_in_the_place_of_a_work_directory_is_not_a_run_without_checkpoints(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["checkpoints", str(tmp_path / "file")])
    assert main() == 2
    assert "file is no folder; expected a run's work directory" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["checkpoints", str(tmp_path / "nowhere")])
    assert main() == 0


if __name__ == "__main__":  # the checkpoint of a new format
    with tempfile.TemporaryDirectory() as folder:
        writing = Checkpoints(folder)
        writing.save(7, tree(7, rows=3), {"model": "x", "format": FORMAT})
        writing.wait()
        shutil.copytree(folder, FORMATS / str(FORMAT))
