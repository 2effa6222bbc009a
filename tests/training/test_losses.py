import jax.numpy as jnp
import numpy as np
import pytest

from configs import recipes
from hybrid_flax.errors import InputError
from hybrid_flax.settings import Loss, from_config
from hybrid_flax.training.losses import make_loss, smoothed_one_hot

TARGETS = smoothed_one_hot(jnp.array([1, 0]), 4, 0.1)
ZEROS = jnp.zeros((2, 4))
TOKENS = {"logits": ZEROS, "token_logits": jnp.zeros((2, 9, 4)), "mixed": jnp.float32(0.25)}


@pytest.mark.parametrize(
    ("config", "outputs", "expected"),
    [
        (recipes.l2vit("l2vit_t"), ZEROS, np.log(4)),
        (recipes.gramian("ga_vit_s"), jnp.zeros((5, 2, 4)), 5 * np.log(2)),  # equal heads agree
        (recipes.glnet_token_labelling("glnet_4g_tklb"), TOKENS, 1.5 * np.log(4)),
    ],
)
def test_each_recipe_has_the_loss_of_its_model(config, outputs, expected):
    assert make_loss(from_config(config).loss)(outputs, TARGETS) == pytest.approx(
        expected, rel=1e-5
    )


def test_label_maps_for_a_model_that_does_not_use_them_are_refused():
    maps = {"label_map": jnp.zeros((2, 2, 5, 3, 3), jnp.float16), "crop": jnp.zeros((2, 4))}
    for outputs in (ZEROS, jnp.zeros((5, 2, 4))):
        with pytest.raises(InputError, match=r"dataset\.label_maps: .* take configs/glnet_4g_tklb"):
            make_loss(Loss())(outputs, maps)


def test_mixed_images_are_taught_both_labels_in_proportion():
    loss = make_loss(from_config(recipes.glnet_token_labelling("glnet_4g_tklb")).loss)
    outputs = TOKENS | {"logits": jnp.array([[0.0, 9.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]])}
    alone = loss(outputs | {"mixed": jnp.float32(0.0)}, TARGETS)
    swapped = loss(outputs | {"mixed": jnp.float32(1.0)}, TARGETS)
    np.testing.assert_allclose(loss(outputs, TARGETS), 0.75 * alone + 0.25 * swapped, rtol=1e-5)
    assert swapped > alone + 1
