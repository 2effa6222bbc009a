"""Files that a run wrote, and that came back otherwise: used, or refused by name, and no more."""

import json
import os
import random

import pytest

from hybrid_flax.errors import InputError
from hybrid_flax.run import workdir
from hybrid_flax.run.checkpoints import Checkpoints
from hybrid_flax.run.goodput import account, read_ledger
from hybrid_flax.run.metrics import MetricWriter
from hybrid_flax.run.workdir import Workdir
from hybrid_flax.settings import to_plain
from tests import tiny

LEDGER = [
    {"start": 1 + i // 3, "step": i, "time": 100.0 + i, "elapsed": 1.0 * i, "seconds": {"train": 1}}
    for i in range(6)
]
METRICS = [{"step": i, "train/loss": 1 / (i + 1)} for i in range(5)]
METRICS.append({"step": 5} | {f"val/{name}": 1.0 for name in ("top1", "top5", "loss", "images")})
JSON_VALUES = (b"null", b"[]", b"{}", b"-1", b"1e999", b"NaN", b'"\xc3\xa4"', b"9" * 5000, b"true")


def damaged(content: bytes, rng: random.Random) -> bytes:
    """The content with flipped bits, a part lost, repeated or of another file, or odd values."""
    data = bytearray(content)
    begin, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    match rng.randrange(6):
        case 0:
            for _ in range(rng.choice((1, 1, 5, 50))):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 1:
            del data[begin:]
        case 2:
            del data[begin:end]
        case 3:
            data[begin:begin] = data[begin:end]
        case 4:
            data[begin:end] = rng.randbytes(end - begin)
        case 5:  # still JSON, of another type
            parts = content.split(b": ")
            place = rng.randrange(1, len(parts)) if len(parts) > 1 else 0
            rest = parts[place].partition(b",")[1:]
            parts[place] = b"".join((rng.choice(JSON_VALUES), *rest))
            data = bytearray(b": ".join(parts))
    return bytes(data)


def lines(records):
    return "".join(json.dumps(record) + "\n" for record in records).encode()


@pytest.mark.parametrize(
    ("first", "count"), [(0, 12), pytest.param(12, 500, marks=pytest.mark.slow)]
)
def test_no_damage_is_more_than_an_error_that_names_the_file(tmp_path, monkeypatch, first, count):
    monkeypatch.setattr(workdir, "versions", lambda: {"jax": "1", "devices": "8 x cpu"})
    settings = tiny.settings()
    plain = to_plain(settings)
    whole = {
        "config.json": json.dumps(plain, indent=2).encode(),
        "versions.json": json.dumps(workdir.versions()).encode(),
        "ledger.jsonl": lines(LEDGER),
        "metrics.jsonl": lines(METRICS),
    }
    os.makedirs(tmp_path / "checkpoints" / "1" / "state")
    said = []
    for seed in range(first, first + count):
        rng = random.Random(seed)
        for name in whole:
            for other, content in whole.items():
                (tmp_path / other).write_bytes(damaged(content, rng) if other == name else content)
            try:
                with Workdir(str(tmp_path), settings) as run:
                    assert json.loads((tmp_path / "config.json").read_text()) == plain
                    str(account(read_ledger(run.ledger)))
                    MetricWriter(run.path, run.metrics, 100).write(101, a=1.0)
            except InputError as error:
                said.append((name, str(error)))
    assert len(said) >= count / 2
    assert {name for name, _ in said} == {"config.json"}
    assert all(str(tmp_path) in text for _, text in said)


def test_a_path_that_is_not_utf8_is_refused_and_damages_nothing():
    with pytest.raises(InputError, match="this path is not UTF-8, or the locale is none with"):
        Checkpoints("/tmp/w\udce9/checkpoints")
