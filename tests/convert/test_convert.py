import argparse
import os
import zipfile

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import convert
import hybrid_flax
from convert.__main__ import main as convert_main
from hybrid_flax.run.saved_weights import load_weights
from hybrid_flax.weights import bridge
from hybrid_flax.weights.functions import as_function
from hybrid_flax.weights.paths import flatten
from tests import reference

torch = pytest.importorskip("torch")

TINY = {"num_classes": 7, "image_size": 64, "dim": 32, "depths": (1, 2, 1, 1)}


@pytest.fixture(scope="module")
def model():
    return reference.model("gcvit_s", **TINY)


@pytest.fixture(scope="module")
def state(model):
    return convert.to_state_dict(model)


def tensors(state, prefix=""):
    return {prefix + key: torch.from_numpy(array.copy()) for key, array in state.items()}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for key, array in want.items():
        assert got[key].dtype == array.dtype, key
        assert got[key].tobytes() == array.tobytes(), key


# ---------------------------------------------------------------------------------- containers


def containers(state):
    plain = tensors(state)
    arguments = argparse.Namespace(lr=0.005, model="gc_vit_base")
    return {
        "official.pth.tar": {"epoch": 3, "arch": "x", "state_dict": plain, "args": arguments},
        "model.pth": {"model": plain, "optimizer": {"state": {0: torch.zeros(2)}}},
        "ema_only.pth": {"state_dict_ema": plain, "epoch": 310},
        "bare.pth": plain,
        "wrapped.pth": {"state_dict": tensors(state, "module.")},
    }


@pytest.mark.parametrize("name", containers({}))
def test_every_container_is_read(tmp_path, state, name):
    torch.save(containers(state)[name], tmp_path / name)
    assert_same(convert.load_checkpoint(tmp_path / name), state)


def test_the_old_pytorch_format_is_read(tmp_path, state):
    file = tmp_path / "old.pth"
    torch.save({"state_dict": tensors(state)}, file, _use_new_zipfile_serialization=False)
    assert_same(convert.load_checkpoint(file), state)


def test_safetensors_are_read(tmp_path, state):
    safetensors.numpy.save_file(dict(state), tmp_path / "model.safetensors")
    assert_same(convert.load_checkpoint(tmp_path / "model.safetensors"), state)


def test_the_content_decides_and_not_the_name(tmp_path, state):
    safetensors.numpy.save_file(dict(state), tmp_path / "model.pth")
    assert_same(convert.load_checkpoint(tmp_path / "model.pth"), state)


@pytest.mark.parametrize("save", ["torch", "safetensors"])
def test_bfloat16_is_read_and_widened_without_loss(tmp_path, model, state, save):
    half = {
        key: array.astype(ml_dtypes.bfloat16) if array.dtype == np.float32 else array
        for key, array in state.items()
    }
    file = tmp_path / "half"
    if save == "torch":
        torch.save({k: torch.tensor(v.astype(np.float32)).bfloat16() if v.dtype != np.int64
                    else torch.tensor(v) for k, v in half.items()}, file)  # fmt: skip
    else:
        safetensors.numpy.save_file(half, file)
    loaded = convert.load_checkpoint(file)
    assert_same(loaded, half)
    copy = bridge.abstract(lambda: hybrid_flax.create_model("gcvit_s", **TINY))
    convert.load_state_dict(copy, loaded)
    exported = convert.to_state_dict(copy)["head.weight"]
    assert exported.dtype == np.float32
    np.testing.assert_array_equal(exported, half["head.weight"].astype(np.float32))


def test_raw_weights_come_before_averaged_ones_unless_asked(tmp_path, state):
    averaged = {key: array + 1 for key, array in state.items()}
    file = tmp_path / "both.pth.tar"
    torch.save({"state_dict": tensors(state), "state_dict_ema": tensors(averaged)}, file)
    assert_same(convert.load_checkpoint(file), state)
    assert_same(convert.load_checkpoint(file, entry="state_dict_ema"), averaged)
    with pytest.raises(ValueError, match="no entry 'model'.*it has state_dict, state_dict_ema"):
        convert.load_checkpoint(file, entry="model")


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("pickled-code-ran",)


@pytest.mark.parametrize("new_format", [True, False])
def test_pickled_code_is_refused_and_does_not_run(tmp_path, monkeypatch, new_format):
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": {"a": torch.zeros(1)}, "extra": RunsCode()}
    torch.save(content, "evil.pth", _use_new_zipfile_serialization=new_format)
    with pytest.raises(ValueError, match=r"evil.pth is refused: .*pickled code.*mkdir.*which"):
        convert.load_checkpoint("evil.pth")
    assert not os.path.exists("pickled-code-ran")


def test_a_zip_bomb_is_refused_unread(tmp_path):
    file = tmp_path / "bomb.pth"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", bytes(50_000_000))
    with pytest.raises(ValueError, match="'archive/data.pkl' is compressed, which PyTorch never"):
        convert.load_checkpoint(file)


def test_a_tensor_larger_than_its_storage_is_refused(tmp_path):
    torch.save({"a": torch.zeros(1).expand(10**12)}, tmp_path / "huge.pth")
    with pytest.raises(
        ValueError, match="'a' cannot be used as weights: it claims shape .*more than the file"
    ):
        convert.load_checkpoint(tmp_path / "huge.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"hello, I am a text file\n", r"24 bytes and begins with b'hello"),
        (b"<!DOCTYPE html><html><title>Google Drive", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"\x80\x02garbage", "it is damaged, or not what torch.save writes"),
        (b"PK\x03\x04 but not a zip", "damaged or incomplete"),
        (b'\x08\x00\x00\x00\x00\x00\x00\x00{"a":1}}', "damaged, or not a safetensors file"),
        (b"\x1f\x8b\x08 packed", "packed with gzip; unpack it first"),
    ],
)
def test_files_that_are_not_checkpoints_are_named_with_the_reason(tmp_path, content, message):
    file = tmp_path / "weights.pth"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        convert.load_checkpoint(file)
    assert str(file) in str(error.value)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(ValueError, match="nowhere.pth cannot be read: No such file"):
        convert.load_checkpoint(tmp_path / "nowhere.pth")
    with pytest.raises(ValueError, match="is a folder; expected one checkpoint file"):
        convert.load_checkpoint(tmp_path)


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_download_is_noticed(tmp_path, state, damage):
    file = tmp_path / "model.pth"
    torch.save(tensors(state), file)
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1  # inside a tensor
    else:
        del data[len(data) // 2 :]
    file.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        convert.load_checkpoint(file)


def test_a_file_without_weights_names_its_entries(tmp_path):
    torch.save({"epoch": 3, "note": "hello"}, tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="no weights under any of state_dict.*are epoch, note"):
        convert.load_checkpoint(tmp_path / "empty.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list, not a dictionary"):
        convert.load_checkpoint(tmp_path / "list.pth")


# -------------------------------------------------------------------------------- state_dicts


def test_loading_and_exporting_is_exact(state):
    copy = bridge.abstract(lambda: hybrid_flax.create_model("gcvit_s", **TINY))
    convert.load_state_dict(copy, state)
    assert_same(convert.to_state_dict(copy), state)


def test_keys_are_those_of_the_release(state):
    for key in (
        "patch_embed.proj.bias",
        "patch_embed.conv_down.conv.2.fc.2.weight",
        "patch_embed.conv_down.norm2.weight",
        "levels.0.q_global_gen.to_q_global.2.conv.3.weight",
        "levels.1.blocks.1.attn.relative_position_bias_table",
        "levels.2.downsample.reduction.weight",
        "levels.3.blocks.0.gamma2",
        "norm.weight",
        "head.bias",
    ):
        assert key in state
    index = state["levels.2.blocks.0.attn.relative_position_index"]
    assert (index.dtype, index.shape) == (np.int64, (16, 16))


def test_every_problem_is_listed_and_nothing_is_loaded(model, state):
    before = flatten(bridge.get_weights(model))
    broken = dict(state)
    broken["extra.weight"] = np.zeros(3, np.float32)
    del broken["norm.bias"]
    broken["head.weight"] = np.zeros((5, 256), np.float32)
    broken["head.bias"] = np.zeros(7, np.float64)
    index = "levels.0.blocks.0.attn.relative_position_index"
    broken[index] = broken[index].T.copy()
    with pytest.raises(ValueError, match="nothing was loaded") as error:
        convert.load_state_dict(model, broken)
    text = str(error.value)
    assert "1 missing from the checkpoint:\n    norm.bias" in text
    assert "1 only in the checkpoint:\n    extra.weight" in text
    assert "3 of another shape or type:" in text
    assert "head.weight: file (5, 256), model (7, 256)" in text
    assert "head.bias: float64 does not fit into float32 without loss" in text
    assert f"{index}: int64 (4, 4) differs" in text
    after = flatten(bridge.get_weights(model))
    assert all(after[path] is leaf for path, leaf in before.items())


def test_derived_buffers_may_be_left_out(state):
    copy = bridge.abstract(lambda: hybrid_flax.create_model("gcvit_s", **TINY))
    convert.load_state_dict(
        copy, {key: array for key, array in state.items() if array.dtype == np.float32}
    )
    assert_same(convert.to_state_dict(copy), state)


def test_pytorch_tensors_are_taken_too(model, state):
    copy = bridge.abstract(lambda: hybrid_flax.create_model("gcvit_s", **TINY))
    convert.load_state_dict(copy, tensors(state))
    images = jnp.asarray(reference.images(0, (1, 64, 64, 3)))
    apply = jax.jit(as_function(model))
    np.testing.assert_array_equal(
        apply(bridge.get_weights(copy), images), apply(bridge.get_weights(model), images)
    )


# ------------------------------------------------------------------------------- command line


@pytest.fixture(scope="module")
def xxt_file(tmp_path_factory):
    """A whole release-sized file, with 5 classes."""
    file = tmp_path_factory.mktemp("release") / "gcvit_1k_xxtiny.pth.tar"
    state = convert.to_state_dict(reference.model("gcvit_xxt", num_classes=5))
    torch.save({"state_dict": tensors(state), "args": argparse.Namespace(lr=0.005)}, file)
    return file


def test_command_line_writes_a_checkpoint(tmp_path, xxt_file, capsys):
    assert convert_main(["gcvit_xxt", str(xxt_file), f"--out={tmp_path}/out"]) == 0
    said = capsys.readouterr().out
    assert "5 classes, 224 pixels" in said
    assert "CC-BY-NC-SA" in said
    weights = load_weights(str(tmp_path / "out"))
    assert weights.meta["source"] == "gcvit_1k_xxtiny.pth.tar"
    assert weights.meta["num_classes"] == 5
    want = flatten(bridge.get_weights(reference.model("gcvit_xxt", num_classes=5)))
    assert weights.trained.keys() == want.keys()
    assert all(np.array_equal(weights.trained[path], want[path]) for path in want)

    assert convert_main(["gcvit_xxt", str(xxt_file), f"--out={tmp_path}/out"]) == 2
    assert "holds checkpoints already" in capsys.readouterr().err


def test_command_line_errors_name_the_cause(tmp_path, xxt_file, capsys):
    out = f"--out={tmp_path}/out"
    assert convert_main(["gcvit_xxtt", str(xxt_file), out]) == 2
    assert "unknown model 'gcvit_xxtt'. Did you mean gcvit_xxt" in capsys.readouterr().err
    assert convert_main(["gcvit_t", str(xxt_file), out]) == 2
    assert "does not fit GCViT" in capsys.readouterr().err
    assert convert_main(["gcvit_xxt", "nowhere.pth", out]) == 2
    assert "nowhere.pth" in capsys.readouterr().err
    assert not os.path.exists(tmp_path / "out")


def test_command_line_takes_what_is_there(tmp_path, xxt_file, capsys):
    out = f"--out={tmp_path}/out"
    bare = tmp_path / "bare.pth"
    torch.save(torch.load(xxt_file, weights_only=False)["state_dict"], bare)
    assert convert_main(["gcvit_xxt", str(bare), out, "--entry=."]) == 0
    assert "5 classes, 224 pixels" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    for arguments, said in (
        ([f"--out={tmp_path}/file"], "file is a file: expected a folder"),
        ([f"--out={tmp_path}/other", "--image_size=100000"], "expected 1 to 2048 pixels"),
        ([f"--out={tmp_path}/other", "--entry=model"], "has no entry 'model' with weights"),
        ([f"--out={tmp_path}/other", "--image_size=64"], "of another shape"),
    ):
        assert convert_main(["gcvit_xxt", str(bare), *arguments]) == 2
        shown = capsys.readouterr().err
        assert shown.startswith("error: ")
        assert said in shown
        assert len(shown.splitlines()) < 20


def test_command_line_selects_classes(tmp_path, capsys):
    state = convert.to_state_dict(reference.model("l2vit_t", num_classes=1500))
    torch.save({"model": tensors(state)}, tmp_path / "22k.pth")
    rows = list(range(1499, 1399, -1))
    (tmp_path / "map.txt").write_text("\n".join(map(str, rows)))
    options = [f"--out={tmp_path}/out", f"--class_map={tmp_path}/map.txt"]
    assert convert_main(["l2vit_t", f"{tmp_path}/22k.pth", *options]) == 0
    assert "100 classes, 224 pixels" in capsys.readouterr().out
    weights = load_weights(str(tmp_path / "out"))
    assert weights.meta["num_classes"] == 100
    np.testing.assert_array_equal(weights.trained["params/head/bias"], state["head.bias"][rows])

    headless = {key: array for key, array in state.items() if not key.startswith("head.")}
    torch.save({"model": tensors(headless)}, tmp_path / "trunk.pth")
    options[0] = f"--out={tmp_path}/trunk"
    assert convert_main(["l2vit_t", f"{tmp_path}/trunk.pth", *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: this state_dict does not fit L2ViT")
    assert "2 missing from the checkpoint, all beginning with head.:" in said
    assert not os.path.exists(tmp_path / "trunk")
