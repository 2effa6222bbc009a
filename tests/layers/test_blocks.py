"""Blocks in turn and in loops: the same results, whatever the blocks hold."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hybrid_flax.layers import (
    BatchNorm,
    drop_path,
    linear,
    run_blocks,
    scanned_blocks,
    window_attention,
)
from hybrid_flax.layers.blocks import Loop, find_loops
from pallas.dispatch import recorded

DIM = 32


class Block(nnx.Module):
    def __init__(self, rate: float, rngs: nnx.Rngs, *, power: int = 1, hidden: int = DIM):
        self.fc1 = linear(DIM, hidden, rngs=rngs)
        self.norm = BatchNorm(hidden)
        self.fc2 = linear(hidden, DIM, rngs=rngs)
        self.power = power
        self.drop_path_rate = rate

    def __call__(self, x, offset, train, key):
        branch = self.fc2(self.norm(self.fc1(x) ** self.power, train)) + offset
        return x + drop_path(branch, self.drop_path_rate, key)


def blocks(kinds: str) -> list[Block]:
    """a and b differ in how they compute, c in its shapes."""
    rngs = nnx.Rngs(0)
    fields: dict[str, dict] = {"a": {}, "b": {"power": 2}, "c": {"hidden": 2 * DIM}}
    return [Block(i / len(kinds), rngs, **fields[kind]) for i, kind in enumerate(kinds)]


@pytest.mark.parametrize(
    ("kinds", "taps", "loops"),
    [
        ("aa", (), []),
        ("aaaa", (), [(0, 4, 1)]),
        ("caaaac", (), [(1, 5, 1)]),
        ("abababa", (), [(0, 6, 2)]),
        ("cabababa", (), [(1, 7, 2)]),
        ("aaaaaaaa", (3,), [(0, 4, 1), (4, 8, 1)]),
        ("aaaaaaaa", (0, 1), [(2, 8, 1)]),
        ("", (), []),
    ],
)
def test_loops_are_found(kinds, taps, loops):
    assert find_loops(blocks(kinds), taps) == [Loop(*loop) for loop in loops]


@pytest.mark.parametrize(
    ("kinds", "taps", "policy"),
    [
        ("caaac", (), None),
        ("abababa", (), jax.checkpoint_policies.nothing_saveable),
        ("aaaaaa", (2,), None),
    ],
)
def test_results_gradients_and_statistics_are_the_same(kinds, taps, policy):
    x = jax.random.normal(jax.random.key(1), (8, 3, DIM))
    graph, *states = nnx.split(nnx.List(blocks(kinds)), nnx.Param, ...)
    params, statistics = map(nnx.to_pure_dict, states)

    def run(params, offset, statistics, loops):
        modules = nnx.merge(graph, params, statistics)
        with scanned_blocks(policy) if loops else contextlib.nullcontext():
            outputs = run_blocks(modules, x, jax.random.key(2), offset, True, taps=taps)
        seen = sum(jnp.mean(x**2) for x in outputs)
        return seen, (outputs, nnx.to_pure_dict(nnx.state(modules, nnx.BatchStat)))

    def found(loops):
        grad = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)
        return jax.device_get(
            jax.jit(grad, static_argnums=3)(params, jnp.ones((1, 1, DIM)), statistics, loops)
        )

    jax.tree.map(
        lambda got, want: np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5),
        found(True),
        found(False),
    )


class Attending(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.qkv = linear(DIM, 3 * DIM, rngs=rngs)
        self.drop_path_rate = 0.0

    def __call__(self, x, key):
        qkv = self.qkv(x).reshape(*x.shape[:3], 3, 1, DIM)
        return x + window_attention(qkv, window=4).reshape(x.shape)


def test_operations_in_a_loop_are_listed_each_time():
    modules = [Attending(nnx.Rngs(0)) for _ in range(5)]
    x = jnp.ones((2, 4, 4, DIM))
    with recorded() as in_turn:
        jax.eval_shape(lambda: run_blocks(modules, x, None))
    with recorded() as in_loops, scanned_blocks():
        jax.eval_shape(lambda: run_blocks(modules, x, None))
    assert in_loops == in_turn
    assert len(in_turn) == 5
