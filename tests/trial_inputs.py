"""The odd inputs of `trials.py`, by kind: how one is made, which door it is given to."""

import functools
import http.server
import io
import json
import pathlib
import pickle
import random
import tarfile
import threading
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from hybrid_flax.errors import InputError
from hybrid_flax.settings import FIELDS
from tests import tiny


class Trial(NamedTuple):
    use: Callable[[], object]
    names: tuple[str, ...]  # one of which a refusal has to have


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A copy with one to four changes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(changed) + 1), rng.choice((1, 2, 8, 64))
        kind = rng.choice(("flip", "flip", "cut", "double", "zero", "end", "random"))
        if kind == "flip" and changed:
            changed[at % len(changed)] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del changed[at : at + length]
        elif kind == "double":
            changed[at:at] = changed[at : at + length]
        elif kind == "zero":
            changed[at : at + length] = bytes(len(changed[at : at + length]))
        elif kind == "end" and rng.random() < 0.3:
            del changed[at:]
        elif kind == "random":
            changed[at:at] = rng.randbytes(length)
    return bytes(changed)


def odd_value(rng: random.Random) -> Any:
    """What JSON or a config may hold in place of something else."""
    return rng.choice(
        [
            None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 10**25, 0.0, -0.5, 0.5, 1.5, 1e300,
            float("nan"), float("inf"), -float("inf"), "", " ", "0", "\ud800", "é", "x" * 5000,
            "../..", "/", "\x00", [], [0], [[]], {}, {"a": 1}, (), (1, 2), (0.5, 0.1), (-1.0, 2.0),
            (float("nan"),) * 3, ("a", "b"), ("(",), 3, 7, 224, 1000, 1e-30, 10**6,
        ]
    )  # fmt: skip


# ---------------------------------------------------------------------------------------- images

_MODES = ("1", "L", "P", "RGB", "RGBA", "CMYK", "LA", "I", "I;16", "F", "YCbCr")
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")


@functools.cache
def _image(mode: str, format: str, size: tuple[int, int]) -> bytes | None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    try:
        Image.fromarray(pixels).convert("L" if mode == "I;16" else mode).convert(mode).save(
            file, format
        )
    except (OSError, ValueError, KeyError):
        return None
    return file.getvalue()


def image(seed: str, folder: pathlib.Path) -> Trial:
    """Decoded and cropped, for evaluation and for training."""
    from hybrid_flax.data.images import eval_crop, open_photo, random_resized_crop

    rng, data = random.Random(seed), None
    while data is None:
        size = rng.choice([(40, 30), (1, 1), (1, 900), (900, 1), (64, 64)])
        data = _image(rng.choice(_MODES), rng.choice(_FORMATS), size)
    data = mutated(data, rng) if rng.random() < 0.9 else data

    def use():
        eval_crop(open_photo(data, "odd.jpg"), 32)
        photo = open_photo(data, "odd.jpg")
        crop = {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "interpolation": "bicubic"}
        random_resized_crop(photo, 32, rng=np.random.default_rng(0), **crop)

    return Trial(use, ("odd.jpg",))


# --------------------------------------------------------------------------------------- weights


@functools.cache
def _weights(kind: str) -> bytes:
    import safetensors.numpy
    import torch

    arrays = {f"layer{i}.weight": np.ones((3, i + 1), np.float32) for i in range(3)}
    if kind == "safetensors":
        return safetensors.numpy.save(arrays)
    state = {key: torch.from_numpy(value) for key, value in arrays.items()}
    beside = {"epoch": 3, "best": np.float64(0.5), "rng": np.arange(4)}
    content = state if kind == "bare" else {"state_dict": state, **beside}
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=kind != "legacy")
    return file.getvalue()


def weights(seed: str, folder: pathlib.Path) -> Trial:
    """Read as a released checkpoint."""
    from convert import load_checkpoint

    rng, file = random.Random(seed), folder / "odd.pth"
    if rng.random() < 0.1:
        file.write_bytes(pickle.dumps(odd_value(rng)))
    else:
        kind = rng.choice(("safetensors", "bare", "nested", "legacy"))
        file.write_bytes(mutated(_weights(kind), rng))
    return Trial(lambda: load_checkpoint(file), ("odd.pth",))


def label_map(seed: str, folder: pathlib.Path) -> Trial:
    """Read as an image's label map."""
    import torch

    from hybrid_flax.data.label_maps import LabelMaps, label_map_file

    rng = random.Random(seed)
    content: Any = torch.ones(2, 5, 18, 18).half()
    draw = rng.random()
    if draw < 0.3:
        content = rng.choice(
            [
                torch.ones(2, 5, 18), torch.ones(1).expand(2, 5, 4000, 4000),
                torch.ones(2, 5, 0, 0), torch.full((2, 5, 3, 3), float("nan")),
                torch.ones(2, 5, 3, 3).to_sparse(), torch.ones(2, 5, 3, 3, requires_grad=True),
                torch.ones(2, 5, 3, 3, dtype=torch.complex64),
                torch.ones(2, 5, 3, 3)[..., ::2], torch.ones(2, 5, 3, 3, device="meta"),
                torch.ones(2, 5, 3, 3).int(), odd_value(rng), np.ones((2, 5, 3, 3)),
            ]
        )  # fmt: skip
    file = io.BytesIO()
    torch.save(content, file)
    target = pathlib.Path(label_map_file(str(folder), "train/cat/odd.jpg"))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(file.getvalue() if draw < 0.3 else mutated(file.getvalue(), rng))
    image = "train/cat/odd.jpg"
    return Trial(lambda: LabelMaps.open(str(folder), 10, image).read(image), ("odd",))


# ------------------------------------------------------------------------------------------ data


def _read_all(name: str, folder: pathlib.Path, **options: Any) -> None:
    from hybrid_flax.data.images import rgb
    from hybrid_flax.data.sources import open_source

    source = open_source(name, str(folder), "train", **options)
    for index in range(min(len(source), 8)):
        rgb(source[index][0])
    assert source.identity()


@functools.cache
def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number in range(4):
            for name, data in (
                (f"{number}.jpg", _image("RGB", "JPEG", (40, 30))),
                (f"{number}.cls", str(number % 2).encode()),
                (f"{number}.json", json.dumps({"label": number % 2}).encode()),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def tar(seed: str, folder: pathlib.Path) -> Trial:
    """Opened as tar shards, and every image decoded."""
    rng = random.Random(seed)
    (folder / "train-0.tar").write_bytes(mutated(_tar(), rng))
    return Trial(lambda: _read_all("tar_shards", folder), ("train-0", str(folder)))


@functools.cache
def _tables() -> dict[str, bytes]:
    import pyarrow as pa
    import pyarrow.parquet

    image = [{"bytes": _image("RGB", "JPEG", (40, 30)), "path": f"{i}.jpg"} for i in range(4)]
    features = {"image": {"_type": "Image"}, "label": {"names": ["a", "b"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pa.table({"image": image, "label": [0, 1, 0, 1]}).replace_schema_metadata(metadata)
    parquet, stream, whole = io.BytesIO(), io.BytesIO(), io.BytesIO()
    pyarrow.parquet.write_table(table, parquet)
    for file, new in ((stream, pa.ipc.new_stream), (whole, pa.ipc.new_file)):
        with new(file, table.schema) as writer:
            writer.write_table(table)
    return {
        "0.parquet": parquet.getvalue(),
        "0.arrow": stream.getvalue(),
        "1.arrow": whole.getvalue(),
    }


def table(seed: str, folder: pathlib.Path) -> Trial:
    """Opened as Parquet or Arrow tables, and every image decoded."""
    rng = random.Random(seed)
    name, data = rng.choice(sorted(_tables().items()))
    (folder / f"train-{name}").write_bytes(mutated(data, rng))
    return Trial(lambda: _read_all("hugging_face", folder), (f"train-{name}",))


def list_of_files(seed: str, folder: pathlib.Path) -> Trial:
    """A list of images with class numbers."""
    rng = random.Random(seed)
    (folder / "meta").mkdir()
    (folder / "train").mkdir()
    lines = []
    for number in range(4):
        (folder / "train" / f"é {number}.jpg").write_bytes(_image("RGB", "JPEG", (40, 30)))
        lines.append(f"é {number}.jpg {number % 2}")
    text = "\n".join(lines).encode(rng.choice(("utf-8", "utf-8-sig", "latin-1", "utf-16")))
    if rng.random() < 0.2:
        text = text.replace(b" 1", b" " + str(odd_value(rng)).encode("utf-8", "replace"))
    text = mutated(text, rng) if rng.random() < 0.6 else text
    (folder / "meta" / "train.txt").write_bytes(text)
    return Trial(lambda: _read_all("list_files", folder), ("train.txt", "é "))


# -------------------------------------------------------------------------------- settings, runs


def setting(seed: str, folder: pathlib.Path) -> Trial:
    """One to three fields with odd values, checked."""
    from hybrid_flax.build import checked

    rng = random.Random(seed)
    config = tiny.get_config()
    changed = rng.sample(sorted(FIELDS), rng.randint(1, 3))

    def use():
        for name in changed:
            section, _, field = name.rpartition(".")
            with config.unlocked(), config.ignore_type():
                (config[section] if section else config)[field] = odd_value(rng)
        checked(config)

    fields = tuple(name.rpartition(".")[2] for name in changed)
    return Trial(use, (*fields, "unknown model"))


def work_directory(seed: str, folder: pathlib.Path) -> Trial:
    """Entered as that of a run to continue, with a damaged record."""
    from hybrid_flax.run.workdir import Workdir
    from hybrid_flax.settings import to_plain
    from hybrid_flax.versions import versions

    rng, settings = random.Random(seed), tiny.settings(model__num_classes=10)
    (folder / "checkpoints" / "3").mkdir(parents=True)
    records = {
        "config.json": json.dumps(to_plain(settings), indent=2),
        "versions.json": json.dumps(versions()),
        "ledger.jsonl": '{"start": 1, "step": 0, "time": 1.0, "elapsed": 1.0, "seconds": {}}\n',
        "metrics.jsonl": '{"step": 2, "train/loss": 1.0}\n',
    }
    damaged = rng.choice(sorted(records))
    for name, text in records.items():
        (folder / name).write_text(text)
    content = mutated(records[damaged].encode(), rng)
    if rng.random() < 0.2:
        content = json.dumps(odd_value(rng)).encode()
    (folder / damaged).write_bytes(content)

    def use():
        from hybrid_flax.run.goodput import Ledger
        from hybrid_flax.run.phases import Phases

        with Workdir(str(folder), settings) as run:
            Ledger(run.ledger, Phases()).account()

    return Trial(use, (damaged, "holds another run"))


# -------------------------------------------------------------------------------------- download


def download(seed: str, folder: pathlib.Path) -> Trial:
    """A release from a server that misbehaves. What is kept must be the file, to the byte."""
    import dataclasses

    from convert.download import download as fetch
    from hybrid_flax import model_info

    rng = random.Random(seed)
    content, other = rng.randbytes(3000), rng.randbytes(3000)
    faults = [rng.choice(_FAULTS) for _ in range(2)]

    def use():
        server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(_Handler, content, other, faults)
        )
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/file.pth"
        info = model_info("gcvit_xxt")
        replace = dataclasses.replace if dataclasses.is_dataclass(info) else type(info)._replace
        info = replace(info, download_url=url, release_file="file.pth")
        try:
            for last in (False, False, True):
                try:
                    kept = fetch("gcvit_xxt", info, folder)
                except InputError:
                    if last:
                        raise
                else:
                    assert kept.read_bytes() in (content, other), "what was kept is no release"
                    return
        finally:
            server.shutdown()
            server.server_close()

    return Trial(use, ("file.pth", "gcvit_xxt"))


_FAULTS = ("none", "cut", "other", "ignores range", "range from 0", "html", "404", "500", "empty")


class _Handler(http.server.BaseHTTPRequestHandler):
    def __init__(self, content, other, faults, *args):
        self._content, self._other, self._faults = content, other, faults
        super().__init__(*args)

    def log_message(self, *_):
        pass

    def do_GET(self):
        fault = self._faults.pop(0) if self._faults else "none"
        if fault == "other":  # from now on
            self._content = self._other
        body, status = self._content, 200
        etag = f'"{zlib.crc32(body)}"'
        begin = 0
        asked = self.headers.get("Range")
        condition = self.headers.get("If-Range")
        if asked and fault != "ignores range" and condition in (None, etag):
            begin, status = int(asked.removeprefix("bytes=").rstrip("-")), 206
        if status == 206 and begin >= len(body):
            status, body, begin = 416, b"", 0
        if fault == "range from 0":
            begin = 0
        if fault in ("404", "500"):
            self.send_error(int(fault))
            return
        sent = body[begin:]
        if fault == "html":
            status, sent = 200, b"<!DOCTYPE html><html>please log in</html>"
        if fault == "empty":
            status, sent = 200, b""
        self.send_response(status)
        self.send_header("Content-Length", str(len(sent)))
        self.send_header("ETag", etag)
        if fault == "html":
            self.send_header("Content-Type", "text/html")
        if status == 206:
            self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        self.wfile.write(sent[: len(sent) // 2] if fault == "cut" else sent)


KINDS: dict[str, Callable[[str, pathlib.Path], Trial]] = {
    "images": image,
    "weights files": weights,
    "label maps": label_map,
    "tar shards": tar,
    "tables": table,
    "lists": list_of_files,
    "settings": setting,
    "work directories": work_directory,
    "downloads": download,
}
