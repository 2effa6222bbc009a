"""Options of the training step beside the recipes, on a model of one matrix and a scale."""

import jax
import jax.numpy as jnp
import numpy as np

from configs import finetune, recipes
from hybrid_flax.distributed.mesh import make_mesh
from hybrid_flax.models.gcvit import GCViT
from hybrid_flax.settings import from_config
from hybrid_flax.training.optimizers import make_optimizer
from hybrid_flax.training.step import make_train_step, new_state


def apply(weights, images, *, train, key):
    """Logits of the mean colour; what batch norms would count, where it is training."""
    params, count = weights["params"], weights["batch_stats"]["norm"]["count"]
    pooled = images.mean((1, 2)) * params["stem"]["scale"][None]
    logits = pooled @ params["head"]["kernel"] + params["head"]["bias"][None]
    return logits, {"norm": {"count": count + 1 if train else count}}


def steps(config, count):
    """The states after each step."""
    config.model.num_classes = 4
    config.augment.mixup_alpha = config.augment.cutmix_alpha = 0.0
    config = from_config(config)
    rng = np.random.default_rng(0)
    weights = {
        "params": {
            "stem": {"scale": jnp.ones(3)},
            "head": {"kernel": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)},
        },
        "batch_stats": {"norm": {"count": jnp.zeros((), jnp.int32)}},
    }
    weights["params"]["head"]["bias"] = jnp.zeros(4)
    optimizer = make_optimizer(config.optimizer, lambda step: 0.1, GCViT.structure)
    mesh = make_mesh(jax.devices()[:1])
    step = make_train_step(apply, optimizer, lambda step: 0.1, config, mesh)
    batch = {
        "image": rng.integers(0, 256, (8, 4, 4, 3), np.uint8),
        "label": np.arange(8, dtype=np.int32) % 4,
    }
    state = new_state(weights, optimizer, config.ema_decay)
    states, metrics = [jax.device_get(state)], []
    for _ in range(count):
        state, numbers = step(state, batch)
        states.append(jax.device_get(state))
        metrics.append(jax.device_get(numbers))
    return states, metrics


def recipe():
    config = recipes.l2vit("l2vit_t")
    config.augment.erasing_probability = 0.0
    return config


def test_a_frozen_parameter_stays_and_does_not_count_in_the_norm():
    free, free_metrics = steps(recipe(), 1)
    config = recipe()
    config.optimizer.freeze = ("^stem/",)
    frozen, metrics = steps(config, 3)
    stem = [state["params"]["stem"]["scale"] for state in frozen]
    assert all((scale == 1).all() for scale in stem)
    assert (free[1]["params"]["stem"]["scale"] != 1).all()
    # What learns learns the same, and its norm is that of its own gradients.
    np.testing.assert_array_equal(
        frozen[1]["params"]["head"]["kernel"], free[1]["params"]["head"]["kernel"]
    )
    assert metrics[0]["grad_norm"] < free_metrics[0]["grad_norm"]
    sizes = [leaf.size for leaf in jax.tree.leaves(frozen[0]["opt_state"])]
    assert sum(size for size in sizes if size > 1) == 2 * (3 * 4 + 4)


def test_a_probe_trains_in_evaluation_mode():
    trained, _ = steps(recipe(), 2)
    assert trained[2]["batch_stats"]["norm"]["count"] == 2
    probe, _ = steps(finetune.get_config("model=l2vit_t,probe"), 2)
    assert probe[2]["batch_stats"]["norm"]["count"] == 0
    assert (probe[2]["params"]["stem"]["scale"] == 1).all()
    assert (probe[2]["params"]["head"]["kernel"] != probe[0]["params"]["head"]["kernel"]).any()
    assert "ema" not in probe[2]


def test_an_average_may_warm_up():
    config = recipe()
    config.ema_decay, config.ema_warmup = 0.15, True
    states, _ = steps(config, 3)
    bias = [state["params"]["head"]["bias"] for state in states]
    average = bias[0]
    for step, decay in enumerate((1 / 10, 0.15, 0.15)):  # then 2/11 and 3/12 would be more
        average = decay * average + (1 - decay) * bias[step + 1]
        np.testing.assert_allclose(states[step + 1]["ema"]["params"]["head"]["bias"], average, 1e-6)
