import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hybrid_flax.analysis import attacks
from hybrid_flax.data import eval_crop
from hybrid_flax.errors import InputError
from tests.analysis import golden


def linear(pixels):
    first = pixels.mean((1, 2, 3))
    return jnp.stack([first, -first], axis=-1)


def test_changes_stay_within_their_budget_and_raise_the_loss():
    pixels = jax.random.uniform(jax.random.key(0), (3, 4, 4, 3))
    labels = jnp.array([0, 1, 0])
    before = attacks.losses(linear(pixels), labels)
    for changed in (
        attacks.fgsm(linear, pixels, labels, 0.1),
        attacks.pgd(linear, pixels, labels, 0.1, 0.03, 5),
    ):
        assert float(jnp.abs(changed - pixels).max()) <= 0.1 + 1e-6
        assert 0 <= float(changed.min()) <= float(changed.max()) <= 1
        assert (attacks.losses(linear(changed), labels) > before).all()
    with pytest.raises(InputError, match="steps=0: expected 1 or more"):
        attacks.pgd(linear, pixels, labels, 0.1, 0.03, 0)


@pytest.mark.slow
def test_losses_are_the_textbooks():
    (case,) = golden.META["attack"]
    model, labels = golden.model(case["model"]), jnp.asarray(case["labels"])
    names = ("china.jpg", "flower.jpg")
    crops = [eval_crop(golden.photo(name), 224, golden.TRANSFORM) for name in names]
    pixels = np.stack(crops).astype(np.float32) / 255
    mean, std = (
        np.asarray(each, np.float32).reshape(1, 1, 1, 3)
        for each in (golden.TRANSFORM.mean, golden.TRANSFORM.std)
    )

    @jax.jit
    def logits_of(pixels):
        return model((pixels - mean) / std)

    def loss(changed):
        return np.asarray(attacks.losses(logits_of(changed), labels))

    np.testing.assert_allclose(loss(pixels), case["clean_loss"], atol=1e-4)
    for budget, want in case["fgsm"].items():
        changed = attacks.fgsm(logits_of, pixels, labels, int(budget) / 255)
        np.testing.assert_allclose(loss(changed), want, rtol=1e-3)
    changed = attacks.pgd(logits_of, pixels, labels, 4 / 255, 1 / 255, 5)
    np.testing.assert_allclose(loss(changed), case["pgd"]["eps 4, step 1, 5 steps"], rtol=1e-3)
