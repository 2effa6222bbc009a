"""Label maps: what the files must be, and that they go where their images go."""

import io
import os
import pickle
import re
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from hybrid_flax.data.augmentation.operations import Operation, apply_operations
from hybrid_flax.data.label_maps import LabelMaps, label_map_file, move
from hybrid_flax.errors import InputError


def test_maps_are_found_by_the_names_of_image_and_folder():
    for image in (
        "/data/train/n01/n01_7.JPEG",
        "shard-3.tar:n01/n01_7.JPEG",
        "a.tar:x/n01/n01_7.x.y",
    ):
        assert label_map_file("maps", image) == "maps/n01/n01_7.pt"
    assert label_map_file("maps", "imagenet2012/train:n01/n01_7.JPEG") == "maps/n01/n01_7.pt"


@pytest.mark.parametrize(
    "operation",
    [
        Operation("Rotate", (27.0,)),
        Operation("Rotate", (-30.0,)),
        Operation("ShearX", (0.3,)),
        Operation("ShearY", (-0.2,)),
        Operation("TranslateX", (0.25,)),
        Operation("TranslateY", (-0.4,)),
        Operation("TranslateXPixels", (-9.0,)),
        Operation("TranslateYPixels", (12.0,)),
        Operation("FlipLeftRight"),
        Operation("FlipTopBottom"),
        Operation("Solarize", (20,)),
    ],
    ids=lambda operation: f"{operation.name} {operation.args}",
)
def test_a_map_moves_as_its_image(operation):
    """A map of coarse cells, of an image that is made of them, wider than high."""
    rows, columns, cell = 6, 12, 9
    values = np.arange(1, rows * columns + 1).reshape(rows, columns)
    classes = values % 7
    label_map = np.stack([values[None], classes[None]]).astype(np.float16)
    pixels = np.kron(values, np.ones((cell, cell))).astype(np.uint8)
    photo = Image.fromarray(pixels).convert("RGB")
    nearest = operation._replace(interpolation="nearest")
    if not operation.is_geometric:
        np.testing.assert_array_equal(move(label_map, operation, photo.size), label_map)
        return
    moved_photo = np.asarray(apply_operations(photo, [nearest], fill=(0, 0, 0)))[..., 0]
    moved = move(label_map, operation, photo.size)
    centres = moved_photo[cell // 2 :: cell, cell // 2 :: cell]
    np.testing.assert_array_equal(moved[0, 0], centres)
    inside = moved[0, 0] > 0
    np.testing.assert_array_equal(moved[1, 0][inside], moved[0, 0][inside] % 7)
    assert inside.all() == operation.name.startswith("Flip")
    assert inside.any()


@pytest.fixture
def maps(tmp_path):
    (tmp_path / "cat").mkdir()
    write(tmp_path / "cat" / "1.pt", torch.zeros(2, 5, 4, 4))
    return LabelMaps.open(str(tmp_path), 10, "train/cat/1.jpg")


def write(file, content):
    torch.save(content, file)


def test_maps_are_read_as_float16(maps):
    found = maps.read("train/cat/1.jpg")
    assert found.shape == maps.shape == (2, 5, 4, 4)
    assert found.dtype == np.float16


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.zeros(2, 5, 3, 4), "2.pt has shape [2, 5, 3, 4], the first one [2, 5, 4, 4]: all"),
        (torch.zeros(5, 4, 4), "2.pt holds torch.Size([5, 4, 4]): expected a tensor [2, K, H, W]"),
        ({"a": 1}, "2.pt holds dict: expected a tensor"),
        (torch.full((2, 5, 4, 4), 10.0), "2.pt has classes from 10 to 10: expected 0 to 9, the"),
        (torch.full((2, 5, 4, 4), torch.nan), "2.pt has logits that are not finite"),
    ],
)
def test_files_that_are_no_label_maps(maps, content, message):
    write(f"{maps.root}/cat/2.pt", content)
    with pytest.raises(ValueError, match=re.escape(message)):
        maps.read("train/cat/2.jpg")


@pytest.mark.filterwarnings("ignore")  # torch's, of quantised tensors
def test_tensors_of_every_kind_are_used_or_named(maps):
    """Used: what is dense, whatever its strides and type. Everything else is refused by name."""
    plain = torch.arange(160.0).reshape(2, 5, 4, 4) % 10
    for number, fine in enumerate(
        (
            plain.to(torch.bfloat16),
            plain.long(),
            plain.requires_grad_(),
            torch.nn.Parameter(plain),
            plain.flip(3).transpose(2, 3),
            torch.ones(1).expand(2, 5, 4, 4),
            plain.neg().neg(),
        )
    ):
        write(f"{maps.root}/cat/fine{number}.pt", fine)
        found = maps.read(f"cat/fine{number}.jpg")
        np.testing.assert_array_equal(found, fine.detach().double().numpy())
    quantised = torch.quantize_per_tensor(plain.detach(), 1.0, 0, torch.quint8)
    for number, (odd, message) in enumerate(
        (
            (plain.detach().to_sparse(), "a sparse_coo tensor .*expected a dense tensor"),
            (plain.detach().to("meta"), "on meta: expected a dense tensor"),
            (quantised, "a quantised tensor"),
            (plain.to(torch.complex64), "complex64 on cpu: expected floats or integers"),
            (plain > 3, "bool on cpu: expected floats or integers"),
            (torch.zeros(1).expand(2, 5, 30000, 30000), "has shape .*expected 1 to"),
            (torch.zeros(2, 0, 4, 4), "has shape .*expected 1 to"),
            (plain + 0.5, "classes that are no whole numbers"),
            (plain + 2048, "above 2048"),
            ([plain.detach()], "holds list: expected"),
            (torch.tensor(1.0), r"holds torch.Size\(\[\]\): expected"),
        )
    ):
        write(f"{maps.root}/cat/odd{number}.pt", odd)
        with pytest.raises(InputError, match=f"odd{number}.pt .*{message}"):
            maps.read(f"cat/odd{number}.jpg")


def test_code_in_a_file_is_refused_without_advice_to_run_it(maps, tmp_path):
    (tmp_path / "cat" / "2.pt").write_bytes(pickle.dumps(print))
    with pytest.raises(InputError, match=r"cannot read label map .*2\.pt") as caught:
        maps.read("cat/2.jpg")
    assert "weights_only" not in str(caught.value)


def test_what_is_no_file_or_too_large_is_named_and_not_read(maps, tmp_path):
    os.mkfifo(tmp_path / "cat" / "pipe.pt")
    with pytest.raises(InputError, match=r"pipe\.pt: .*expected a regular file"):
        maps.read("cat/pipe.jpg")
    with open(tmp_path / "cat" / "large.pt", "wb") as stream:
        stream.truncate(1 << 40)
    with pytest.raises(InputError, match=r"large\.pt takes more than"):
        maps.read("cat/large.jpg")
    with zipfile.ZipFile(tmp_path / "cat" / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data", bytes(70_000_000))
    with pytest.raises(InputError, match=r"bomb\.pt takes more than"):
        maps.read("cat/bomb.jpg")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("count", [150, pytest.param(1500, marks=pytest.mark.slow)])
def test_damaged_files_are_used_or_refused_by_name(maps, count):
    rng, files, used = np.random.default_rng(count), [], 0
    for zipped in (True, False):
        stream = io.BytesIO()
        torch.save(torch.zeros(2, 5, 4, 4), stream, _use_new_zipfile_serialization=zipped)
        files.append(stream.getvalue())
    for _ in range(count):
        data = bytearray(files[rng.integers(2)])
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(len(data))] = rng.integers(256)
        if rng.random() < 0.1:
            data = data[: rng.integers(len(data))]
        with open(f"{maps.root}/cat/2.pt", "wb") as stream:
            stream.write(data)
        try:
            used += maps.read("cat/2.jpg").shape == maps.shape
        except InputError as error:
            assert "2.pt" in str(error)  # noqa: PT017
    print(f"label maps: {count} tried, {used} used, {count - used} refused")
    assert 0 < used < count


@pytest.mark.parametrize("image", ["train/../x.jpg", "a.tar:../x.jpg", "./x.jpg", "a/x\0.jpg"])
def test_no_image_has_its_map_elsewhere(image):
    with pytest.raises(InputError, match="label maps are found by"):
        label_map_file("maps", image)


def test_names_of_images_stay_below_the_root():
    assert label_map_file("maps", "/etc/passwd") == "maps/etc/passwd.pt"
    assert label_map_file("maps", "../../etc/x.jpg") == "maps/etc/x.pt"
    assert label_map_file("maps", "a/..jpg") == "maps/a/.pt"


def test_files_that_are_missing_or_damaged(maps, tmp_path):
    with pytest.raises(
        ValueError, match="image train/dog/1.jpg has no label map: there is no file"
    ):
        maps.read("train/dog/1.jpg")
    (tmp_path / "cat" / "2.pt").write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(ValueError, match="cannot read label map .*2.pt: "):
        maps.read("train/cat/2.jpg")
    with pytest.raises(ValueError, match="label_maps=nowhere: there is no such folder. Unpack"):
        LabelMaps.open("nowhere", 10, "train/cat/1.jpg")
