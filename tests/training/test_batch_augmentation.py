import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_flax.training.batch_augmentation import mix, normalise, random_erasing

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def test_normalise():
    images = jnp.asarray([[[[0, 128, 255]]]], jnp.uint8)
    got = normalise(images, (0.5, 0.25, 0.0), (0.5, 1.0, 2.0))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got[0, 0, 0], [-1.0, 128 / 255 - 0.25, 0.5], rtol=1e-6)


def mixed(seed, images, targets, mixup=0.8, cutmix=1.0, switch=0.5):
    return _mix(
        jax.random.key(seed),
        images,
        targets,
        mixup_alpha=mixup,
        cutmix_alpha=cutmix,
        cutmix_probability=switch,
    )


_mix = jax.jit(mix, static_argnames=("mixup_alpha", "cutmix_alpha", "cutmix_probability"))


def batch(size=32):
    """Image i and its partner hold 1 and 0; targets likewise."""
    images = jnp.concatenate([jnp.ones((1, size, size, 3)), jnp.zeros((1, size, size, 3))])
    return images, jnp.eye(2)


def test_mixup_blends_with_the_reversed_batch_and_mixes_targets_alike():
    shares = []
    for seed in range(60):
        images, targets = mixed(seed, *batch(4), cutmix=0.0)
        values = np.unique(images[0])
        assert len(values) == 1
        np.testing.assert_allclose(images[0] + images[1], 1, atol=1e-6)
        np.testing.assert_allclose(targets[0], [values[0], 1 - values[0]], atol=1e-6)
        shares.append(float(values[0]))
    assert np.mean(shares) == pytest.approx(0.5, abs=0.12)
    assert np.std(shares) == pytest.approx(np.sqrt(0.25 / (2 * 0.8 + 1)), abs=0.06)  # Beta(.8, .8)


def test_cutmix_pastes_one_box_and_corrects_the_share_to_its_area():
    shares = []
    for seed in range(60):
        images, targets = mixed(seed, *batch(), mixup=0.0)
        inside = np.asarray(images[0, :, :, 0]) == 0
        rows, columns = inside.any(1), inside.any(0)
        assert (inside == rows[:, None] & columns[None, :]).all()  # a rectangle
        assert np.diff(np.flatnonzero(rows)).max(initial=1) == 1
        np.testing.assert_allclose(targets[0, 0], 1 - inside.mean(), atol=1e-6)
        shares.append(1 - inside.mean())
    assert np.std(shares) > 0.15


def test_the_coin_decides_between_both():
    kinds = [len(np.unique(mixed(seed, *batch())[0][0])) > 1 for seed in range(100)]
    assert np.mean(kinds) == pytest.approx(0.5, abs=0.15)
    assert not any(len(np.unique(mixed(s, *batch(), switch=0.0)[0][0])) > 1 for s in range(10))


def test_mixing_is_off_when_both_alphas_are_zero():
    images, targets = batch()
    assert mix(
        jax.random.key(0), images, targets, mixup_alpha=0.0, cutmix_alpha=0.0,
        cutmix_probability=0.5,
    ) == (images, targets)  # fmt: skip


def test_mixing_depends_on_the_key_only():
    first, again, other = (mixed(seed, *batch())[0] for seed in (5, 5, 6))
    np.testing.assert_array_equal(first, again)
    assert (np.asarray(first) != np.asarray(other)).any()


def test_erasing_replaces_rectangles_of_a_quarter_of_the_images_with_noise():
    images = jnp.full((2000, 32, 32, 3), 9.0)
    got = np.asarray(jax.jit(lambda k, x: random_erasing(k, x, 0.25))(jax.random.key(0), images))
    erased = (got != 9).any(axis=-1)
    hit = erased.any(axis=(1, 2))
    assert hit.mean() == pytest.approx(0.25, abs=0.03)
    areas, ratios = [], []
    for inside in erased[hit]:
        rows, columns = inside.any(1), inside.any(0)
        assert (inside == rows[:, None] & columns[None, :]).all()
        areas.append(inside.mean())
        ratios.append(rows.sum() / columns.sum())
    assert 0.015 < min(areas) < 0.03
    assert 0.3 < max(areas) < 0.36
    assert np.mean(np.log(ratios)) == pytest.approx(0, abs=0.1)
    assert min(ratios) > 0.2
    noise = got[erased]
    assert noise.mean() == pytest.approx(0, abs=0.02)
    assert noise.std() == pytest.approx(1, abs=0.02)
    starts = np.argmax(erased[hit].any(2), axis=1)
    assert starts.min() == 0
    assert starts.max() > 20


def test_erasing_is_off_at_probability_zero():
    images = jnp.ones((2, 8, 8, 3))
    assert random_erasing(jax.random.key(0), images, 0.0) is images
