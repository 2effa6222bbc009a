import io
import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from hybrid_flax.data import augment_op, eval_crop, images
from hybrid_flax.data.images import UnreadableImageError, open_photo, random_resized_crop, rgb
from hybrid_flax.errors import InputError

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "data"


def photo(name: str) -> Image.Image:
    """One of the two photographs that scikit-learn bundles."""
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image(name))


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDEN / "preprocess.json").read_text())


@pytest.fixture(scope="module")
def arrays():
    return np.load(GOLDEN / "preprocess.npz")


def test_eval_crops_equal_timm_to_the_pixel(golden, arrays):
    for index, case in enumerate(golden["eval"]):
        crop = eval_crop(
            photo(case["photo"]),
            image_size=case["size"],
            crop_fraction=case["crop_pct"],
            crop_mode=case["crop_mode"],
            interpolation=case["interpolation"],
        )
        assert crop.dtype == np.uint8
        assert crop.shape == tuple(case["shape"])
        stride = golden["eval_stride"]
        got, want = crop[::stride, ::stride].astype(int), arrays[f"eval_{index}"].astype(int)
        assert np.abs(got - want).max() <= 1, case


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1"])
def test_every_mode_becomes_rgb(mode):
    assert eval_crop(Image.new(mode, (300, 200)), image_size=64).shape == (64, 64, 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (3, 2), (640, 427)])
def test_any_photo_size_gives_the_crop_size(size):
    for crop_mode in ("center", "squash"):
        assert eval_crop(Image.new("RGB", size), 64, 0.875, crop_mode).shape == (64, 64, 3)


def test_bad_arguments_of_the_crop_are_named():
    with pytest.raises(ValueError, match="unknown crop_mode 'centre'; choose"):
        eval_crop(Image.new("RGB", (8, 8)), 8, crop_mode="centre")
    with pytest.raises(ValueError, match="unknown interpolation 'cubic'; choose one of nearest"):
        eval_crop(Image.new("RGB", (8, 8)), 8, interpolation="cubic")
    with pytest.raises(ValueError, match=r"crop_fraction=1\.5: expected a number above 0, up to 1"):
        eval_crop(Image.new("RGB", (8, 8)), 8, crop_fraction=1.5)
    for size in (0, -1, 5.5, "32", (32, 48), True, 100_000):
        with pytest.raises(InputError, match=r"image_size=.*expected a whole number of pixels"):
            eval_crop(Image.new("RGB", (8, 8)), size)
    assert eval_crop(Image.new("RGB", (8, 8)), np.int64(8)).shape == (8, 8, 3)
    for fraction in ("0.9", None):
        with pytest.raises(InputError, match="crop_fraction=.*expected a number"):
            eval_crop(Image.new("RGB", (8, 8)), 8, fraction)
    with pytest.raises(InputError, match=r"is a ndarray; expected a Pillow image: PIL.Image.open"):
        eval_crop(np.zeros((8, 8, 3), np.uint8), 8)


@pytest.mark.parametrize("data", [b"", b"not a JPEG", b"\xff\xd8\xff\xe0 cut off"])
def test_what_is_no_image_is_named(data):
    with pytest.raises(UnreadableImageError, match=rf"image cat.JPEG \({len(data)} bytes\)"):
        rgb(open_photo(data, "cat.JPEG"))


def test_a_truncated_jpeg_is_unreadable_not_half_grey(tmp_path):
    photo("flower.jpg").save(tmp_path / "whole.jpg")
    data = (tmp_path / "whole.jpg").read_bytes()
    assert rgb(open_photo(data, "whole")).size == (640, 427)
    with pytest.raises(UnreadableImageError, match="half"):
        rgb(open_photo(data[: len(data) // 2], "half"))


def test_random_resized_crop_draws_areas_and_ratios_in_range():
    # Each pixel holds its own position, so that the crop can be read off the result.
    height, width = 200, 300
    y, x = np.mgrid[:height, :width]
    source = Image.fromarray(np.stack([y % 256, x // 2, 0 * x], -1).astype(np.uint8))
    rng = np.random.default_rng(0)
    areas, ratios = [], []
    for _ in range(300):
        crop = np.asarray(
            random_resized_crop(source, 32, (0.08, 1), (3 / 4, 4 / 3), "nearest", rng)[0]
        )
        assert crop.shape == (32, 32, 3)
        tall = (int(crop[-1, 0, 0]) - int(crop[0, 0, 0])) * 32 / 31
        wide = 2 * (int(crop[0, -1, 1]) - int(crop[0, 0, 1])) * 32 / 31
        areas.append(tall * wide / (height * width))
        ratios.append(wide / tall)
    assert 0.06 < min(areas) < 0.12
    assert 0.8 < max(areas) <= 1.05
    assert 0.68 < min(ratios)
    assert max(ratios) < 1.45


def test_a_crop_that_never_fits_is_the_middle():
    source = Image.fromarray(np.arange(400, dtype=np.uint8)[None, :, None].repeat(3, 2))
    rng = np.random.default_rng(0)
    crop, box = random_resized_crop(source, 1, (0.9, 1.0), (0.9, 1.1), "nearest", rng)
    assert box == (199, 0, 200, 1)
    assert crop.getpixel((0, 0))[0] == 199  # of 400 pixels


def test_operations_equal_timm_to_the_bit(golden):
    import hashlib

    source = photo("flower.jpg").resize((224, 224), Image.Resampling.BICUBIC)
    for case in golden["ops"]:
        result = augment_op(
            source, case["op"], *case["args"], fill=(124, 116, 104), interpolation="bicubic"
        )
        assert hashlib.sha256(np.asarray(result).tobytes()).hexdigest() == case["sha256"], case


# -------------------------------------------------------------------- files as people have them


def stored(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("image", "kind", "options", "want"),
    [
        (Image.new("L", (9, 7), 200), "JPEG", {"quality": 100}, (200, 200, 200)),
        (Image.new("CMYK", (9, 7), (0, 255, 0, 0)), "JPEG", {"quality": 100}, (255, 0, 255)),
        (Image.new("RGBA", (9, 7), (10, 20, 30, 0)), "PNG", {}, (10, 20, 30)),  # not blended
        (Image.new("LA", (9, 7), (40, 0)), "PNG", {}, (40, 40, 40)),
        (Image.new("1", (9, 7), 1), "PNG", {}, (255, 255, 255)),
        (Image.new("RGB", (9, 7), (255, 0, 0)).quantize(4), "PNG", {}, (255, 0, 0)),
        (
            Image.new("RGB", (9, 7), (255, 0, 0)).quantize(4),
            "PNG",
            {"transparency": b"\x00"},
            (255, 0, 0),
        ),
        # Pillow's own conversion would cut everything above 255 off: white.
        (Image.fromarray(np.full((7, 9), 0x8040, np.uint16)), "PNG", {}, (128, 128, 128)),
        (Image.fromarray(np.full((7, 9), 0x8040, np.uint16)), "TIFF", {}, (128, 128, 128)),
    ],
    ids=["grey", "CMYK", "RGBA", "LA", "1", "palette", "transparent", "16-bit", "16-bit TIFF"],
)
def test_every_kind_of_file_becomes_rgb(image, kind, options, want):
    photo = rgb(open_photo(stored(image, kind, **options), "x"))
    assert (photo.mode, photo.size) == ("RGB", (9, 7))
    np.testing.assert_allclose(photo.getpixel((4, 3)), want, atol=2)


def test_an_exif_orientation_is_not_applied_as_in_timm():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    assert rgb(open_photo(stored(Image.new("RGB", (9, 7)), "JPEG", exif=exif), "x")).size == (9, 7)


def test_an_image_too_large_to_be_one_is_unreadable(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30)
    data = stored(Image.new("RGB", (9, 7)), "PNG")
    with pytest.raises(UnreadableImageError, match="image bomb.png .*decompression bomb"):
        open_photo(data, "bomb.png")


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (5000, 2)])
def test_a_training_crop_of_any_size_of_photo(size):
    crop, _ = random_resized_crop(
        Image.new("RGB", size, (7, 8, 9)), 16, (0.08, 1), (3 / 4, 4 / 3), "bicubic",
        np.random.default_rng(0),
    )  # fmt: skip
    np.testing.assert_array_equal(crop, np.full((16, 16, 3), (7, 8, 9)))


# ----------------------------------------------------------------- decoding no more than is needed


def crops(data, count=12, size=48, fast=False):
    """Random crops of a file, and of the same file decoded beforehand."""
    for seed in range(count):
        whole = rgb(open_photo(data, "whole"))
        whole.encoded = None
        yield [
            np.asarray(
                random_resized_crop(
                    each, size, (0.08, 1), (3 / 4, 4 / 3), "bicubic",
                    np.random.default_rng(seed), fast=fast,
                )[0]
            ).astype(int)
            for each in (open_photo(data, "part"), whole)
        ]  # fmt: skip


@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True},
                                     {"restart_marker_rows": 1}])  # fmt: skip
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_crop_of_a_file_equals_the_crop_of_the_decoded_photo(options, mode):
    source = photo("china.jpg").resize((203, 151)).convert(mode)
    for got, want in crops(stored(source, "JPEG", quality=90, **options)):
        np.testing.assert_array_equal(got, want)


def test_rows_below_the_crop_are_not_decoded(monkeypatch):
    data = stored(photo("china.jpg"), "JPEG")
    opened = []
    original = images.open_photo
    monkeypatch.setattr(
        images, "open_photo", lambda *args: opened.append(original(*args)) or opened[-1]
    )
    images._decode_part(original(data, "x"), (10, 20, 300, 100), None)
    assert [image.size for image in opened] == [(640, 128)]
    images._decode_part(original(data, "x"), (10, 20, 300, 420), None)
    assert len(opened) == 1


def test_a_file_that_is_cut_off_below_the_crop_is_still_unreadable():
    data = stored(photo("china.jpg"), "JPEG")
    with pytest.raises(UnreadableImageError, match="image tail.jpg: image file is truncated"):
        images._decode_part(open_photo(data[: -len(data) // 4], "tail.jpg"), (9, 20, 300, 60), None)


def test_fast_decoding_gives_almost_the_same_crop():
    data = stored(photo("flower.jpg"), "JPEG", quality=95)
    differences = [np.abs(got - want).mean() for got, want in crops(data, size=32, fast=True)]
    assert 0 < max(differences) < 4  # of 255
    factors = [
        images._decode_part(open_photo(data, "x"), (0, 0, side, side), 32)[1]
        for side in (32, 63, 64, 127, 128, 256, 427)
    ]
    assert factors == [1, 1, 2, 2, 4, 8, 8]


# --------------------------------------------------------------- what nobody needs, and odd values


@pytest.mark.parametrize(
    "data",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n",
        b"\x89HDF\r\n\x1a\n" + bytes(64),
        b"GRIB\0\0\0\1" + bytes(64),
        b"BUFR\0\0\0\4" + bytes(64),
        b"\xd7\xcd\xc6\x9a\x00\x00" + bytes(64),  # WMF
    ],
    ids=["EPS", "HDF5", "GRIB", "BUFR", "WMF"],
)
def test_formats_that_no_dataset_has_are_not_opened(data):
    with pytest.raises(
        UnreadableImageError, match="image x.jpg .*in none of the formats JPEG, PNG"
    ):
        open_photo(data, "x.jpg")


def test_of_an_animation_it_is_the_first_image():
    frames = [Image.new("RGB", (9, 7), colour) for colour in ((255, 0, 0), (0, 0, 255))]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        data = stored(frames[0], kind, save_all=True, append_images=frames[1:])
        np.testing.assert_allclose(
            rgb(open_photo(data, "x")).getpixel((4, 3)), (255, 0, 0), atol=3, err_msg=kind
        )


GREY = np.arange(64).reshape(8, 8) * 4


@pytest.mark.parametrize(
    ("array", "kind"),
    [
        (GREY.astype(np.int32), "TIFF"),
        ((GREY / 255).astype(np.float32), "TIFF"),
        (GREY.astype(np.float32), "PPM"),  # written as PFM
    ],
    ids=["int32", "float", "PFM"],
)
def test_values_that_may_mean_any_grey_are_refused_not_black(array, kind):
    data = stored(Image.fromarray(array), kind)
    for photo in (open_photo(data, "scan.tif"), Image.fromarray(array)):
        with pytest.raises(UnreadableImageError, match="nothing says which value is white"):
            eval_crop(photo, 8)


def test_an_image_without_pixels_is_unreadable():
    with pytest.raises(UnreadableImageError, match="it has no pixels"):
        eval_crop(Image.new("RGB", (0, 5)), 8)
    with pytest.raises(UnreadableImageError, match="empty.ppm"):
        open_photo(b"P6 0 5 255\n", "empty.ppm")


def test_grey_of_12_bits_and_of_wider_ppm_keeps_its_range():
    packed = bytes([0x80, 0x08, 0x00])  # two pixels of 2048
    entries = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1),
               (279, 3)]  # fmt: skip
    head = b"II*\0" + (12).to_bytes(4, "little") + packed + b"\0"
    body = b"".join(
        tag.to_bytes(2, "little") + b"\x03\0\x01\0\0\0" + value.to_bytes(4, "little")
        for tag, value in entries
    )
    tiff = head + len(entries).to_bytes(2, "little") + body + bytes(4)
    assert rgb(open_photo(tiff, "x")).getpixel((0, 0)) == (128, 128, 128)
    pgm = b"P5 1 1 4095\n" + (2048).to_bytes(2, "big")
    assert rgb(open_photo(pgm, "x")).getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("size", [(5, 4000), (4000, 5), (90, 61)])
@pytest.mark.parametrize("interpolation", images.FILTERS)
@pytest.mark.parametrize(("crop_mode", "fraction"), [("center", 0.875), ("squash", 0.5)])
def test_the_crop_alone_is_resized_to_the_same_pixels(
    monkeypatch, size, interpolation, crop_mode, fraction
):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    source, crops = Image.fromarray(noise), []
    for most in (10**9, 0):  # as a whole, in part
        monkeypatch.setattr(images, "_WHOLE", most)
        crops.append(eval_crop(source, 16, fraction, crop_mode, interpolation).astype(int))
    differences = np.abs(crops[0] - crops[1])
    if interpolation in ("nearest", "box"):  # a centre may lie on the border of two pixels
        assert (differences > 1).mean() < 0.1
    else:
        assert differences.max() <= 1


def test_ordinary_photos_are_resized_as_a_whole(monkeypatch):
    monkeypatch.setattr(images, "_part_of_resized", None)
    for size in ((24, 1), (640, 427), (500, 4000)):
        eval_crop(Image.new("RGB", size), 32)


def test_a_crop_of_almost_nothing_is_refused():
    eval_crop(Image.new("RGB", (64, 64)), 224, 0.01)  # 22,400 pixels square, if it were resized
    for fraction in (0.009, 1e-300, float("nan"), -1.0):
        with pytest.raises(ValueError, match=r"crop_fraction=.*no less than 0\.01"):
            eval_crop(Image.new("RGB", (8, 8)), 8, fraction)


def test_a_training_crop_has_at_least_a_pixel():
    rng = np.random.default_rng(0)
    for size in ((5, 1), (1, 5)):
        crop, box = random_resized_crop(
            Image.new("RGB", size), 8, (0.9, 1.0), (0.1, 0.2), "bilinear", rng
        )
        assert crop.size == (8, 8)
        assert box[2] > box[0]
        assert box[3] > box[1]
