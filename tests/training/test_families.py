"""Kinds of models take training steps with their own recipe, on small digits.

GC ViT does in test_train.py, through checkpoints and evaluation, Swin in test_attention_paths.py,
the others in test_torch_loop.py.
"""

import jax
import numpy as np
import pytest

from hybrid_flax import bridge
from hybrid_flax.training.step import weights_of
from tests.training.digits import prepare


@pytest.mark.parametrize("name", ["ga_vit_s", "unified_halonet_micro", "unified_internimage_micro"])
def test_two_steps_on_the_digits(name):
    step, state, batches = prepare(name, 8)
    before = jax.device_get(weights_of(state))
    losses = []
    for _ in range(2):
        state, metrics = step(state, next(batches))
        losses.append(float(metrics["loss"]))
        assert np.isfinite(metrics["grad_norm"])
        assert metrics["grad_norm"] > 0

    # A fresh classifier knows nothing: ln 10, or for the heads' binary losses ln 2 each.
    expected = 2 * np.log(2) if name.startswith("ga") else np.log(10)
    assert losses[0] == pytest.approx(expected, rel=0.35)
    after = bridge.flatten(jax.device_get(weights_of(state)))
    moved = [path for path, old in bridge.flatten(before).items() if (after[path] != old).any()]
    assert len(moved) > 0.9 * len(after)
    counts = [value for path, value in after.items() if path.endswith("/count")]
    assert all(count == 2 for count in counts)
    assert counts
