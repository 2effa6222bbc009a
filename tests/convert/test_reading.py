"""What a weights file may hold beside the weights, and where; what tensors may be."""

import argparse
import collections
import datetime
import json
import os
import pathlib
import subprocess
import sys
import warnings

import ml_dtypes
import numpy as np
import pytest

import convert
from hybrid_flax.errors import InputError

torch = pytest.importorskip("torch")

ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)
WEIGHTS = {"head.weight": torch.from_numpy(ARRAY)}


def saved(tmp_path, content, new_format=True):
    torch.save(content, tmp_path / "run.pth", _use_new_zipfile_serialization=new_format)
    return tmp_path / "run.pth"


def assert_read(file, **options):
    found = convert.load_checkpoint(file, **options)
    assert list(found) == ["head.weight"]
    np.testing.assert_array_equal(found["head.weight"], ARRAY)


class Settings(dict):
    """A dictionary with attributes, as configs are."""


class Meter:
    def __init__(self):
        self.values = [1.0]


def beside():
    return {
        "a NumPy scalar": np.float64(82.1),
        "an array": np.zeros(3),
        "an array of objects": np.array([1, "a"], object),
        "a dtype": np.dtype("f4"),
        "random states": [np.random.get_state(), torch.get_rng_state(), np.random.default_rng(0)],
        "arguments": argparse.Namespace(mean=np.ones(3), path=pathlib.Path("x")),
        "Python's kinds": [
            collections.defaultdict(list, {1: [2]}),
            collections.deque([1], 3),
            collections.Counter("ab"),
            datetime.datetime(2026, 1, 1),
            frozenset([1]),
            2**100,
        ],
        "objects of other code": Settings(a=Meter(), b=Settings(c=[Meter()])),
    }


@pytest.mark.parametrize("new_format", [True, False])
def test_what_lies_beside_the_weights_does_not_refuse_them(tmp_path, capsys, new_format):
    for content in beside().values():
        assert_read(saved(tmp_path, {"model": WEIGHTS, "beside": content}, new_format))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1  # only what nobody knows is worth a line
    assert f"of {__name__}.Meter, {__name__}.Settings in it" in said[0]


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("function", [eval, os.system, subprocess.getoutput, torch.load, np.load])
def test_no_call_in_a_file_is_run(tmp_path, monkeypatch, function):
    monkeypatch.chdir(tmp_path)
    file = saved(tmp_path, {"model": WEIGHTS, "x": Calls(function, "open('made', 'w')")})
    if function in (torch.load, np.load):  # of no harm, since nothing is called
        assert_read(file)
    else:
        with pytest.raises(InputError, match=r"run.pth is refused: .*(eval|system|getoutput)"):
            convert.load_checkpoint(file)
    assert os.listdir() == ["run.pth"]


def test_arrays_of_numpy_are_weights_too(tmp_path):
    arrays = {
        "a": ARRAY.astype(np.float16),
        "b": np.asfortranarray(ARRAY),
        "c": ARRAY.astype(">f4"),
        "d": np.array(3),
    }
    found = convert.load_checkpoint(saved(tmp_path, {"model": arrays}))
    assert found.keys() == arrays.keys()
    for key, array in arrays.items():
        np.testing.assert_array_equal(found[key], array)
        assert found[key].dtype == array.dtype


@pytest.mark.parametrize(
    ("content", "entry"),
    [
        (WEIGHTS, None),
        (WEIGHTS, "."),
        (WEIGHTS | {"epoch": 3}, None),
        ({"state_dict": WEIGHTS}, None),
        ({"weights_of_ours": WEIGHTS, "optimizer": {"state": {0: WEIGHTS}}}, None),
        ({"model": {"state_dict": WEIGHTS}, "epoch": 3}, None),
        ({"ema": {"module": WEIGHTS}}, "ema/module"),
        ({"student": WEIGHTS, "teacher": {"head.weight": torch.zeros(2, 3)}}, None),
        ({"net": WEIGHTS, "other": {"head.weight": torch.zeros(1)}}, "net"),
        ({"state_dict": {"a.head.weight": WEIGHTS["head.weight"], "b.head.weight": 0}}, "a."),
        ({"x": {"a.head.weight": WEIGHTS["head.weight"]}}, "x/a."),
    ],
)
def test_the_weights_are_found_wherever_they_are(tmp_path, content, entry):
    assert_read(saved(tmp_path, content), entry=entry)


def test_what_the_authors_did_decides_only_if_it_is_there(tmp_path, capsys):
    other = {"head.weight": torch.zeros(2, 3)}
    file = saved(tmp_path, {"model": other, "model_ema": WEIGHTS})
    assert_read(file, published="model_ema")
    assert (
        "those of model_ema; there are others of model, which --entry=" in capsys.readouterr().out
    )
    assert not convert.load_checkpoint(file)["head.weight"].any()
    assert_read(saved(tmp_path, WEIGHTS), published="model_ema")
    assert_read(saved(tmp_path, {"state_dict": WEIGHTS}), published="model_ema")


def test_several_models_without_a_usual_name_are_listed(tmp_path):
    file = saved(tmp_path, {"left": WEIGHTS, "right": WEIGHTS.copy()})
    with pytest.raises(InputError, match="weights under left, right: name one with --entry=left"):
        convert.load_checkpoint(file)


def odd_tensors():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of prototypes
        return {
            "sparse": torch.eye(2).to_sparse(),
            "meta": torch.empty(2, device="meta"),
            "nested": torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
            "quantised": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
            "ComplexHalf": torch.ones(2, dtype=torch.complex32),
        }


def test_tensors_without_a_dense_array_are_refused_by_key(tmp_path):
    for kind, tensor in odd_tensors().items():
        file = saved(tmp_path, {"model": WEIGHTS | {"odd.weight": tensor}})
        with pytest.raises(InputError, match=rf"run.pth: 'odd.weight' cannot be used.*{kind}"):
            convert.load_checkpoint(file)


@pytest.mark.parametrize("key", [1, ("a",), None])
def test_keys_that_are_no_text_are_refused(tmp_path, key):
    with pytest.raises(InputError, match=r"run.pth: the key .* is a \w+; keys of weights are text"):
        convert.load_checkpoint(saved(tmp_path, {key: torch.ones(2)}))


def test_rare_dtypes_and_views_are_read_as_they_are(tmp_path):
    complex_ones = torch.complex(torch.ones(2), torch.ones(2))
    tensors = {
        "float8": torch.ones(2).to(torch.float8_e4m3fn),
        "conjugate": complex_ones.conj(),
        "negative": complex_ones.clone().conj().imag,
        "strided": torch.arange(16.0).reshape(4, 4).t()[::2],
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    found = convert.load_checkpoint(saved(tmp_path, tensors))
    assert found["float8"].dtype == ml_dtypes.float8_e4m3fn
    assert found["conjugate"].tolist() == [1 - 1j] * 2
    assert found["negative"].tolist() == [-1.0, -1.0]
    assert found["strided"].tolist() == [[0, 4, 8, 12], [2, 6, 10, 14]]
    assert found["parameter"].tolist() == [1, 1]


def write_safetensors(file, shape, dtype="F32"):
    size = 0 if 0 in shape else 4
    header = {"head.weight": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))


@pytest.mark.parametrize(("shape", "dtype"), [([1] * 101, "F32"), ([0, 2**62], "F32")])
def test_safetensors_beyond_numpy_are_refused_by_key(tmp_path, shape, dtype):
    file = tmp_path / "model.safetensors"
    write_safetensors(file, shape, dtype)
    with pytest.raises(InputError, match=r"model.safetensors is damaged.* at 'head.weight'"):
        convert.load_checkpoint(file)


def test_safetensors_of_a_type_that_numpy_has_not_are_not_called_damaged(tmp_path):
    from safetensors.torch import save_file

    save_file({"head.weight": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "fp8.safetensors")
    with pytest.raises(InputError, match="'head.weight' is of a type that NumPy has not"):
        convert.load_checkpoint(tmp_path / "fp8.safetensors")


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(InputError, match=r"pipe.pth is a pipe or a device; expected a checkpoint"):
        convert.load_checkpoint(tmp_path / "pipe.pth")


def test_programs_and_objects_are_named(tmp_path):
    file = saved(tmp_path, torch.nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"an object of torch.nn.modules.linear.Linear, which"):
        convert.load_checkpoint(file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript will go
        torch.jit.script(torch.nn.Linear(2, 2)).save(file)
    with pytest.raises(InputError, match=r"is a TorchScript program, not weights. Make weights"):
        convert.load_checkpoint(file)


def test_without_pytorch_the_message_says_so(tmp_path, monkeypatch):
    file = saved(tmp_path, WEIGHTS)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"reading .*run.pth needs PyTorch"):
        convert.load_checkpoint(file)


@pytest.mark.parametrize(
    "key",
    [
        "module._orig_mod.head.weight",
        "_orig_mod.module.head.weight",
        "head._checkpoint_wrapped_module.weight",
        "_fsdp_wrapped_module.head._fsdp_wrapped_module._orig_mod.weight",
    ],
)
def test_what_wrappers_put_into_keys_is_taken_out(tmp_path, key):
    assert_read(saved(tmp_path, {key: torch.from_numpy(ARRAY)}))


def test_weights_with_and_without_a_wrapper_are_refused(tmp_path):
    twice = {"head._orig_mod.weight": torch.from_numpy(ARRAY), **WEIGHTS}
    with pytest.raises(InputError, match="some weights twice, with and without"):
        convert.load_checkpoint(saved(tmp_path, twice))


def test_an_object_in_the_place_of_weights_is_named(tmp_path):
    torch.save({"model": torch.nn.Linear(2, 2), "epoch": 3}, tmp_path / "m.pth")
    with pytest.raises(InputError, match="model is an object of torch.nn.*Linear, which needs the"):
        convert.load_checkpoint(tmp_path / "m.pth")
