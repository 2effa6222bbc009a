"""Weights files with flipped, missing and foreign bytes: used, or refused by name, never more."""

import collections
import zipfile

import numpy as np
import pytest
import safetensors.numpy

import convert
from hybrid_flax.errors import InputError

torch = pytest.importorskip("torch")

FORMATS = ("zip", "legacy", "safetensors")


def whole(kind: str, folder) -> bytes:
    """A small file of a format, with what training scripts keep beside the weights."""
    file = folder / f"whole.{kind}"
    state = {f"stages.{i}.weight": np.arange(6, dtype=np.float32).reshape(2, 3) for i in range(3)}
    if kind == "safetensors":
        safetensors.numpy.save_file(state, file)
    else:
        content = {
            "model": {key: torch.from_numpy(array) for key, array in state.items()},
            "best": np.float64(82.1),
            "curve": np.zeros(3),
            "meters": collections.defaultdict(list, loss=[1.0]),
        }
        torch.save(content, file, _use_new_zipfile_serialization=kind == "zip")
    return file.read_bytes()


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    found = bytearray(data)
    how = rng.integers(5)
    place = int(rng.integers(len(found)))
    if how == 0:
        del found[place:]
    elif how == 1:
        found[place:place] = rng.bytes(int(rng.integers(1, 20)))
    elif how == 2:
        del found[place : place + int(rng.integers(1, 20))]
    else:  # the structure lies near the start
        for _ in range(rng.integers(1, 6)):
            within = len(found) if how == 3 else min(len(found), 600)
            found[int(rng.integers(within))] ^= 1 << int(rng.integers(8))
    return bytes(found)


def without_checksums(data: bytes, file) -> None:
    """Writes a zip's members anew after damage to one of them, so that its checksums are right."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in data:
            archive.writestr(name, content)


def read(file) -> tuple[str, str, list[str]]:
    """What came of a file: the outcome, the refusal, its keys."""
    try:
        return "used", "", list(convert.load_checkpoint(file))
    except InputError as error:
        return "refused", str(error), []


def tried(folder, kind: str, count: int, seed: int) -> collections.Counter:
    """How often damaged files were used, and how often refused."""
    rng, data, outcomes = np.random.default_rng(seed), whole(kind, folder), collections.Counter()
    file = folder / "damaged.pth"
    members = []
    if kind == "zip":
        with zipfile.ZipFile(folder / "whole.zip") as archive:
            members = [(name, archive.read(name)) for name in archive.namelist()]
    for number in range(count):
        if members and number % 2:  # behind right checksums
            hurt = [
                (name, damaged(content, rng) if name.endswith("data.pkl") else content)
                for name, content in members
            ]
            without_checksums(hurt, file)
        else:
            file.write_bytes(damaged(data, rng))
        outcome, said, keys = read(file)
        assert outcome == "used" or ("damaged.pth" in said and len(said) < 2000), (number, said)
        assert all(isinstance(key, str) for key in keys), number
        outcomes[outcome] += 1
    return outcomes


@pytest.mark.parametrize("kind", FORMATS)
def test_a_damaged_file_is_used_or_refused(tmp_path, kind):
    outcomes = tried(tmp_path, kind, 60, seed=1)
    assert outcomes["refused"] > 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", FORMATS)
def test_many_damaged_files_are_used_or_refused(tmp_path, kind):
    assert tried(tmp_path, kind, 1000, seed=2).total() == 1000
