import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from hybrid_flax.distributed.mesh import make_mesh
from hybrid_flax.distributed.shardings import (
    memory_table,
    say_unused_rules,
    show_memory_table,
    state_shardings,
)
from hybrid_flax.distributed.transfer import broadcast_from_first, gather_to_host, put
from hybrid_flax.models.gcvit import GCViT
from hybrid_flax.weights.paths import flatten


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def state():
    params = {
        "mlp": {
            "fc1": {"kernel": array(64, 256), "bias": array(256)},
            "fc2": {"kernel": array(256, 64), "bias": array(64)},
        },
        "conv": {"kernel": array(3, 3, 64, 96)},
        "head": {"kernel": array(64, 1001)},
    }
    block = {"block": params}
    return {"params": block, "opt_state": ({"mu": block},), "ema": {"params": block}}


def specs(mesh, **options):
    shardings = state_shardings(state(), mesh, GCViT.structure, **options)
    return {path: each.spec for path, each in flatten(shardings).items()}


def test_on_data_alone_everything_is_whole():
    assert set(specs(make_mesh()).values()) == {PartitionSpec()}


def test_mlps_are_split_over_tensor_by_columns_then_rows():
    found = specs(make_mesh(tensor=8))
    assert found["params/block/mlp/fc1/kernel"] == PartitionSpec(None, "tensor")
    assert found["params/block/mlp/fc1/bias"] == PartitionSpec("tensor")
    assert found["params/block/mlp/fc2/kernel"] == PartitionSpec("tensor")
    assert found["params/block/mlp/fc2/bias"] == PartitionSpec()
    # 1001 classes do not divide.
    assert found["params/block/head/kernel"] == PartitionSpec()


def test_fsdp_splits_the_largest_dimension_that_is_whole_and_divides():
    found = specs(make_mesh(data=2, fsdp=2, tensor=2))
    assert found["params/block/mlp/fc1/kernel"] == PartitionSpec("fsdp", "tensor")
    assert found["params/block/mlp/fc2/kernel"] == PartitionSpec("tensor", "fsdp")
    assert found["params/block/conv/kernel"] == PartitionSpec(None, None, None, "fsdp")
    assert found["params/block/mlp/fc1/bias"] == PartitionSpec("tensor")  # too small for fsdp
    for path, spec in found.items():
        # A parameter, its moment and its average lie alike.
        assert spec == found["params/block/" + path.partition("block/")[2]]


def test_optimizer_and_average_may_be_split_over_data_too():
    found = specs(make_mesh(fsdp=2), optimizer_over_data=True)
    assert found["params/block/mlp/fc1/kernel"] == PartitionSpec(None, "fsdp")
    for part in ("opt_state/0/mu", "ema/params"):
        assert found[f"{part}/block/mlp/fc1/kernel"] == PartitionSpec(None, ("fsdp", "data"))
    alone = specs(make_mesh(), optimizer_over_data=True)
    assert alone["params/block/conv/kernel"] == PartitionSpec()
    assert alone["ema/params/block/conv/kernel"] == PartitionSpec(
        None, None, None, ("fsdp", "data")
    )


def test_own_rules_come_first():
    found = specs(make_mesh(fsdp=4, tensor=2), rules=((r"conv/kernel$", ("tensor", None)),))
    assert found["params/block/conv/kernel"] == PartitionSpec(None, None, "tensor", "fsdp")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (
            "head/kernel$",
            "rules: 'head/kernel$' is not a pattern and a tuple of mesh axes, such as",
        ),
        (("head/kernel$", "fsdp"), "('head/kernel$', 'fsdp') is not a pattern and a tuple"),
        (("(", ()), "--config.sharding.rules: '(' is not a regular expression"),
        (("head", ("model",)), "'head' asks for the mesh axis 'model'; there are 'data', 'fsdp'"),
    ],
)
def test_a_rule_that_cannot_be_used_is_named(rule, message):
    with pytest.raises(ValueError) as error:
        state_shardings(state(), make_mesh(), GCViT.structure, (rule,))
    assert message in str(error.value)


def show(mesh):
    shardings = state_shardings(state(), mesh, GCViT.structure)
    return show_memory_table(memory_table(state(), shardings))


def test_the_table_says_what_a_device_holds():
    mesh = make_mesh(fsdp=8)
    table = show_memory_table(
        memory_table(state(), state_shardings(state(), mesh, GCViT.structure))
    )
    assert table.splitlines()[0].split() == [
        "part", "split", "over", "arrays", "MiB", "on", "a", "device", "largest"
    ]  # fmt: skip
    # One of 64 KiB, an eighth of it on a device.
    assert re.search(r"^params +-, fsdp +1 +0.1 +0.0 +params/block/mlp/fc1/kernel$", table, re.M)
    whole_state = show_memory_table(
        memory_table(state(), state_shardings(state(), make_mesh(), GCViT.structure))
    )
    assert whole_state.startswith("every device holds the whole state, ")


def test_arrays_come_back_from_the_devices_as_they_went():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    rng = np.random.default_rng(0)
    arrays = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), state())
    shardings = state_shardings(arrays, mesh, GCViT.structure)
    placed = put(arrays, shardings)
    kernel = placed["params"]["block"]["mlp"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (32, 128)
    back = flatten(gather_to_host(placed))
    for path, want in flatten(arrays).items():
        np.testing.assert_array_equal(np.array(back[path]), want)
    assert broadcast_from_first(back, back) is back


def test_a_rule_for_nothing_is_said(caplog):
    say_unused_rules((("nosuch", ("fsdp",)), ("kernel$", ("fsdp",))), state())
    assert "rules: 'nosuch' has no effect: it is found in no array's path, such as" in caplog.text
    assert len(caplog.records) == 1
