import itertools

import grain
import numpy as np
import pytest
from PIL import Image

from hybrid_flax.data.augmentation.policies import parse_policy
from hybrid_flax.data.images import UnreadableImageError
from hybrid_flax.data.loader import eval_batches, train_batches
from hybrid_flax.data.order import Repeated, batches_per_epoch
from hybrid_flax.data.sources import open_source
from hybrid_flax.data.transforms import EvalTransform, TrainTransform
from hybrid_flax.errors import InputError
from tests.data.test_sources import write_images


class Coloured:
    """Image i has the colour (i, 0, 0) and the label i mod 5; those in `bad` cannot be read."""

    num_classes = 5

    def __init__(self, count, bad=()):
        self._count, self._bad = count, bad

    def __len__(self):
        return self._count

    def __getitem__(self, index):
        if index in self._bad:
            raise UnreadableImageError(f"cannot read image number {index}")
        return Image.new("RGB", (20, 16), (index, 0, 0)), index % 5


def transform(source, skip=False, policy=None):
    return TrainTransform(
        source, 8, (0.08, 1.0), (3 / 4, 4 / 3), "random", 0.5, policy, (124, 116, 104), skip
    )


def take(batches, count):
    return list(itertools.islice(batches, count))


def assert_equal(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_batches_have_the_documented_form():
    (batch,) = take(train_batches(transform(Coloured(10)), batch_size=4, seed=0), 1)
    assert {name: (a.shape, a.dtype) for name, a in batch.items()} == {
        "image": ((4, 8, 8, 3), np.uint8),
        "label": ((4,), np.int32),
        "index": ((4,), np.int32),
        "unreadable": ((4,), np.int32),
    }
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["index"])
    np.testing.assert_array_equal(batch["label"], batch["index"] % 5)


def test_every_epoch_is_another_permutation():
    batches = take(train_batches(transform(Coloured(23)), batch_size=5, seed=0), 8)
    epochs = [np.concatenate([b["index"] for b in batches[i : i + 4]]) for i in (0, 4)]
    for epoch in epochs:
        assert len(set(epoch)) == 20
    assert epochs[0].tolist() != epochs[1].tolist()
    assert batches_per_epoch(Coloured(23), 5) == 4


def test_a_later_start_sees_what_an_uninterrupted_run_would_have_seen():
    source = transform(Coloured(23), policy=parse_policy("rand-m9-mstd0.5-inc1"))
    whole = take(train_batches(source, batch_size=5, seed=3), 11)
    for start in (1, 4, 7):
        resumed = take(train_batches(source, batch_size=5, seed=3, start_step=start), 11 - start)
        assert_equal(resumed, whole[start:])


def test_worker_processes_change_nothing():
    source = transform(Coloured(23), policy=parse_policy("rand-m9-mstd0.5-inc1"))
    options = {"batch_size": 6, "seed": 3, "start_step": 2, "repeats": 3, "group": 2}
    whole = take(train_batches(source, **options), 7)
    for workers in (1, 3):
        batches = train_batches(source, **options, num_workers=workers)
        assert_equal(take(batches, 7), whole)
        batches.close()


def test_repeats_share_a_batch_but_not_a_group_nor_a_crop():
    class Positions(Coloured):
        def __getitem__(self, index):
            y, x = np.mgrid[:64, :96]
            pixels = np.stack([np.full_like(x, index), y, x], -1)
            return Image.fromarray(pixels.astype(np.uint8)), 0

    options = {"batch_size": 12, "seed": 0, "repeats": 3, "group": 4}
    batches = take(train_batches(transform(Positions(50)), **options), 8)
    for batch in batches:
        images, counts = np.unique(batch["index"], return_counts=True)
        assert counts.tolist() == [3, 3, 3, 3]
        for group in batch["index"].reshape(3, 4):
            assert set(group) == set(images)
        for image in images:
            crops = batch["image"][batch["index"] == image, :, :, 1:]
            assert len({crop.tobytes() for crop in crops}) == 3
    epochs = [np.unique([batch["index"] for batch in batches[i : i + 4]]) for i in (0, 4)]
    assert [len(epoch) for epoch in epochs] == [16, 16]  # a third of four batches
    assert epochs[0].tolist() != epochs[1].tolist()


def test_the_order_of_repeats_by_hand():
    order = grain.MapDataset.source([10, 11, 12, 13, 14, 15, 16, 17, 18])
    one_group = Repeated(order, repeats=2, batch_size=4, group=0)
    assert [one_group[i] for i in range(8)] == [10, 10, 11, 11, 12, 12, 13, 13]
    # The list 10 10 10 11 · 11 11 12 12 · …, dealt to two groups of two.
    dealt = Repeated(order, repeats=3, batch_size=4, group=2)
    assert [dealt[i] for i in range(8)] == [10, 10, 10, 11, 11, 12, 11, 12]
    assert len(dealt) == 9
    assert list(dealt[1:3]) == [10, 10]


def test_repeats_resume_in_the_middle_of_an_epoch():
    source = transform(Coloured(23), policy=parse_policy("v0"))
    options = {"batch_size": 6, "seed": 3, "repeats": 3, "group": 3}
    whole = take(train_batches(source, **options), 9)
    for start in (1, 3, 5):
        resumed = take(train_batches(source, **options, start_step=start), 9 - start)
        assert_equal(resumed, whole[start:])


def test_another_seed_is_another_order_and_augmentation():
    first, second = (take(train_batches(transform(Coloured(50)), batch_size=50, seed=s), 1)[0]
                     for s in (0, 1))  # fmt: skip
    assert first["index"].tolist() != second["index"].tolist()


@pytest.mark.parametrize("axis", [0, 1])
def test_flip_probabilities(axis):
    class Half(Coloured):
        def __getitem__(self, index):
            image = np.zeros((8, 8, 3), np.uint8)
            (image if axis else image.swapaxes(0, 1))[:4] = 255
            return Image.fromarray(image), 0

    def flipped(probability):
        sideways, upside_down = (probability, 0.0) if axis == 0 else (0.0, probability)
        never_cropped = TrainTransform(
            Half(400), 8, (1.0, 1.0), (1.0, 1.0), "nearest", sideways, None, (0, 0, 0), False,
            upside_down,
        )  # fmt: skip
        (batch,) = take(train_batches(never_cropped, batch_size=400, seed=0), 1)
        return (batch["image"][:, 0, 0, 0] == 0).mean()

    assert flipped(0.0) == 0
    assert flipped(1.0) == 1
    assert flipped(0.5) == pytest.approx(0.5, abs=0.1)


def test_a_batch_larger_than_the_dataset_is_refused():
    with pytest.raises(ValueError, match="batch_size=64, but there are only 10 training images"):
        train_batches(transform(Coloured(10)), batch_size=64, seed=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_stops_training_and_is_named(workers):
    batches = train_batches(
        transform(Coloured(10, bad=(3,))), batch_size=5, seed=0, num_workers=workers
    )
    with pytest.raises(ValueError, match="cannot read image number 3"):
        take(batches, 2)
    batches.close()


def test_an_unreadable_image_is_replaced_counted_and_named(caplog):
    source = transform(Coloured(10, bad=(3, 4)), skip=True)
    batches = take(train_batches(source, batch_size=5, seed=0), 2)
    assert sum(batch["unreadable"].sum() for batch in batches) == 3  # 3 → 4 → 5, and 4 → 5
    shown = np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches])
    assert sorted(shown) == [0, 1, 2, 5, 5, 5, 6, 7, 8, 9]
    assert caplog.text.count("cannot read image number 3; the next image takes its place") == 1
    resumed = take(train_batches(source, batch_size=5, seed=0, start_step=1), 1)
    assert_equal(resumed, batches[1:])


def test_nothing_but_unreadable_images_is_an_error_even_when_skipping():
    source = transform(Coloured(60, bad=range(60)), skip=True)
    with pytest.raises(ValueError, match="50 unreadable training images in a row"):
        take(train_batches(source, batch_size=5, seed=0), 1)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("batch_size", [1, 4, 7, 16])
def test_evaluation_covers_every_image_once(batch_size, workers):
    source = EvalTransform(Coloured(13), 8, 0.875, "center", "bicubic", False)
    batches = list(eval_batches(source, batch_size=batch_size, num_workers=workers))
    assert {len(batch["label"]) for batch in batches} == {batch_size}
    mask = np.concatenate([batch["mask"] for batch in batches])
    index = np.concatenate([batch["index"] for batch in batches])
    assert index[mask > 0].tolist() == list(range(13))
    assert mask.sum() == 13


def test_an_unreadable_validation_image_is_masked_or_fatal():
    source = EvalTransform(Coloured(13, bad=(5,)), 8, 0.875, "center", "bicubic", True)
    batches = list(eval_batches(source, batch_size=13))
    assert batches[0]["mask"].tolist() == [1.0] * 5 + [0.0] + [1.0] * 7
    fatal = EvalTransform(Coloured(13, bad=(5,)), 8, 0.875, "center", "bicubic", False)
    with pytest.raises(ValueError, match="cannot read image number 5"):
        list(eval_batches(fatal, batch_size=13))


@pytest.mark.parametrize("label", [-1, 5, 1000])
def test_a_label_outside_the_classes_stops_training_and_evaluation(label):
    class Wrong(Coloured):
        def __getitem__(self, index):
            return super().__getitem__(index)[0], label

    message = rf"image number \d has the label {label}, but there are 5 classes, counted from 0"
    with pytest.raises(ValueError, match=message):
        take(train_batches(transform(Wrong(6), skip=True), batch_size=3, seed=0), 1)
    with pytest.raises(ValueError, match=message):
        list(eval_batches(EvalTransform(Wrong(6), 8, 1, "center", "box", True), batch_size=3))


def test_more_processes_than_images():
    source = transform(Coloured(1))
    whole = take(train_batches(source, batch_size=1, seed=0), 5)
    batches = train_batches(source, batch_size=1, seed=0, num_workers=2)
    assert_equal(take(batches, 5), whole)
    batches.close()


def test_a_file_damaged_after_its_head_is_skipped_or_named(tmp_path, caplog):
    for split in ("train", "val"):
        write_images(tmp_path / split / "a", 4, size=(64, 64))
        bad = tmp_path / split / "a" / "0002.JPEG"
        bad.write_bytes(bad.read_bytes()[:-40])
    train, val = (open_source("image_folder", str(tmp_path), split) for split in ("train", "val"))
    (batch,) = take(train_batches(transform(train, skip=True), batch_size=4, seed=0), 1)
    assert batch["unreadable"].sum() == 1
    assert "train/a/0002.JPEG: image file is truncated" in caplog.text
    (batch,) = eval_batches(EvalTransform(val, 8, 1, "center", "box", True), batch_size=4)
    assert batch["mask"].tolist() == [1, 1, 0, 1]
    with pytest.raises(ValueError, match="train/a/0002.JPEG: image file is truncated"):
        take(train_batches(transform(train), batch_size=4, seed=0), 1)


def test_validation_of_nothing_but_unreadable_images_is_an_error():
    source = EvalTransform(Coloured(3, bad=range(3)), 8, 0.875, "center", "bicubic", True)
    with pytest.raises(InputError, match="none of 3 images can be read"):
        list(eval_batches(source, batch_size=2))
    list(eval_batches(source, batch_size=2, need_some=False))
    list(eval_batches(source, batch_size=2, rows=np.arange(1)))  # others may have been read
