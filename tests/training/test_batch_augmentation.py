import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_flax.distributed.batch import batch_sharded, to_devices
from hybrid_flax.distributed.mesh import make_mesh
from hybrid_flax.training.batch_augmentation import (
    cheap_normal,
    mix,
    normalise,
    random_erasing,
)

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def test_normalise():
    images = jnp.asarray([[[[0, 128, 255]]]], jnp.uint8)
    got = normalise(images, (0.5, 0.25, 0.0), (0.5, 1.0, 2.0))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got[0, 0, 0], [-1.0, 128 / 255 - 0.25, 0.5], rtol=1e-6)


def mixed(seed, images, targets, mixup=0.8, cutmix=1.0, switch=0.5, probability=1.0, group=0):
    return _mix(
        jax.random.key(seed),
        images,
        targets,
        mixup_alpha=mixup,
        cutmix_alpha=cutmix,
        cutmix_probability=switch,
        probability=probability,
        group=group,
    )


_mix = jax.jit(mix, static_argnames=("mixup_alpha", "cutmix_alpha", "cutmix_probability", "group"))


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


def numbered(count, size=8):
    """uint8 images whose pixels are all 7·i, and targets that say which image it is."""
    values = jnp.arange(count, dtype=jnp.uint8) * 7
    return jnp.broadcast_to(values[:, None, None, None], (count, size, size, 3)), jnp.eye(count)


def test_every_group_draws_for_itself_and_mixes_with_its_own_reverse():
    kinds, shares = [], []
    for seed in range(20):
        images, targets = (np.asarray(x) for x in mixed(seed, *numbered(12), group=4))
        for start in (0, 4, 8):
            share = targets[start, start]
            box = images[start] != images[start][0, 0]
            for i in range(4):
                row, partner = start + i, start + 3 - i
                want = np.zeros(12)
                want[row] += share
                want[partner] += 1 - share
                np.testing.assert_allclose(targets[row], want, atol=1e-6)
                if not box.any():
                    blend = share * np.float32(7 * row) + (1 - share) * np.float32(7 * partner)
                    assert np.abs(images[row].astype(float) - blend).max() <= 0.5 + 1e-4
                else:
                    assert set(np.unique(images[row])) <= {7 * row, 7 * partner}
                    taken = (images[row] == 7 * partner).mean()
                    assert 1 - taken == pytest.approx(share, abs=1e-6)
            kinds.append(box.any())
            shares.append(share)
    assert 0.2 < np.mean(kinds) < 0.7  # half are cutmix, and some boxes cover all or nothing
    assert len(set(shares)) > 40  # boxes of 8 × 8 pixels have few areas
    draws = np.reshape(shares, (20, 3))
    assert abs(np.corrcoef(draws.T)[np.triu_indices(3, 1)]).max() < 0.6


def test_a_group_of_all_images_or_more_is_the_whole_batch():
    want = mixed(3, *numbered(6))
    for group in (6, 7, 128):
        for got, expected in zip(mixed(3, *numbered(6), group=group), want, strict=True):
            np.testing.assert_array_equal(got, expected)


def test_whole_pixel_values_stay_whole_and_are_rounded_to_even():
    images = jnp.asarray([200, 101], jnp.uint8)[:, None, None, None] * jnp.ones(
        (1, 1, 1, 3), "uint8"
    )
    for seed in range(10):
        got, targets = mixed(seed, images, jnp.eye(2), cutmix=0.0)
        assert got.dtype == jnp.uint8
        share = np.float64(targets[0, 0])
        want = np.rint([200 * share + 101 * (1 - share), 101 * share + 200 * (1 - share)])
        np.testing.assert_array_equal(got[:, 0, 0, 0], want)


def test_the_probability_of_mixing():
    images, targets = numbered(64)
    unmixed = []
    for seed in range(10):
        got = mixed(seed, images, targets, probability=0.3, group=2)
        same = (np.asarray(got[1]) == np.asarray(targets)).all(axis=1)
        np.testing.assert_array_equal(got[0][same], images[same])
        unmixed.append(same.mean())
    assert np.mean(unmixed) == pytest.approx(0.7, abs=0.1)
    for got, want in zip(
        mixed(0, images, targets, probability=0.0), (images, targets), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_images_that_do_not_fill_groups_are_refused():
    with pytest.raises(ValueError, match="10 images cannot be mixed in groups of 4"):
        mixed(0, *numbered(10), group=4)


@pytest.mark.parametrize("group", [2, 4, 8, 16])
def test_groups_are_mixed_alike_on_eight_devices_without_gathering(group):
    mesh = make_mesh(jax.devices())
    images, targets = numbered(16)
    want = mixed(1, images, targets, group=group)
    on_devices = to_devices({"image": np.asarray(images), "target": np.asarray(targets)}, mesh)
    arguments = (jax.random.key(1), on_devices["image"], on_devices["target"])
    options = {
        "mixup_alpha": 0.8, "cutmix_alpha": 1.0, "cutmix_probability": 0.5, "probability": 1.0,
        "group": group,
    }  # fmt: skip
    for got, expected in zip(_mix(*arguments, **options), want, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-6)
        assert got.sharding.is_equivalent_to(batch_sharded(mesh), got.ndim)
    text = _mix.lower(*arguments, **options).compile().as_text()
    of_images = [line for line in text.splitlines() if ",8,8,3]" in line]
    assert not any("all-gather(" in line or "all-reduce(" in line for line in of_images)
    if group == 2:  # each device has whole groups
        assert not any("collective-permute(" in line for line in of_images)


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


_normal = jax.jit(cheap_normal, static_argnums=1)


def test_cheap_noise_is_normal_and_independent():
    shape = (16, 64, 64, 3)
    noise = np.asarray(_normal(jax.random.key(0), shape), np.float64)
    count = noise.size
    assert noise.mean() == pytest.approx(0, abs=4 / np.sqrt(count))
    assert noise.var() == pytest.approx(1, abs=4 * np.sqrt(2 / count))
    assert (noise**3).mean() == pytest.approx(0, abs=4 * np.sqrt(15 / count))
    assert (noise**4).mean() == pytest.approx(3, abs=4 * np.sqrt(96 / count))
    shares = np.histogram(noise, [-np.inf, -2, -1, 0, 1, 2, np.inf])[0] / count
    np.testing.assert_allclose(
        shares, [0.02275, 0.1359, 0.3413, 0.3413, 0.1359, 0.02275], rtol=0.06
    )
    assert len(np.unique(noise)) > 0.98 * count
    neighbours = {
        axis: np.roll(noise, 1, axis) for axis in range(4)
    } | {"next step": np.asarray(_normal(jax.random.key(1), shape))}  # fmt: skip
    for name, other in neighbours.items():
        assert abs((noise * other).mean()) < 4 / np.sqrt(count), name
        assert abs((noise**2 * np.square(other)).mean() - 1) < 20 / np.sqrt(count), name


def test_cheap_noise_is_the_same_wherever_it_is_made():
    key, shape = jax.random.key(2), (16, 8, 8, 3)
    want = _normal(key, shape)
    sharded = jax.jit(
        cheap_normal, static_argnums=1, out_shardings=batch_sharded(make_mesh(jax.devices()))
    )
    np.testing.assert_array_equal(sharded(key, shape), want)
    text = sharded.lower(key, shape).compile().as_text()
    assert "all-gather" not in text
