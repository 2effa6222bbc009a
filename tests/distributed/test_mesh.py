import jax
import numpy as np
import pytest

from hybrid_flax.distributed.batch import (
    batch_parts,
    check_batch_size,
    local_rows,
    round_up,
    to_devices,
)
from hybrid_flax.distributed.mesh import make_mesh


def shape(**sizes):
    return tuple(make_mesh(**sizes).shape.values())


def test_one_axis_takes_the_rest():
    assert shape() == (8, 1, 1)
    assert shape(fsdp=4) == (2, 4, 1)
    assert shape(data=2, fsdp=-1, tensor=2) == (2, 2, 2)
    assert shape(data=1, fsdp=8) == (1, 8, 1)
    assert tuple(make_mesh(jax.devices()[:1]).shape.values()) == (1, 1, 1)


def test_slices_lie_side_by_side_on_data():
    mesh = make_mesh(fsdp=2, num_slices=2)
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    assert {tuple(sorted(part.ravel())) for part in (ids[:2], ids[2:])} == {
        (0, 1, 2, 3),
        (4, 5, 6, 7),
    }


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 3}, "--config.mesh.fsdp=3, --config.mesh.tensor=1: this mesh needs 3 devices or"),
        ({"data": 3, "fsdp": 2}, "this mesh needs 6 devices, there are 8; -1 for one axis takes"),
        ({"fsdp": -1}, "expected numbers from 1, and -1, the rest, for one at most"),
        ({"tensor": 0}, "--config.mesh.tensor=0: expected numbers from 1"),
        ({"num_slices": 3}, "--config.mesh.num_slices=3: the 8 devices are in 1 slices; 0 takes"),
        ({"fsdp": 8, "num_slices": 2}, "data=1 is not a multiple of the 2 slices"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, message):
    with pytest.raises(ValueError) as error:
        make_mesh(**sizes)
    assert message in str(error.value)


@pytest.mark.parametrize("sizes", [{}, {"fsdp": 4}, {"tensor": 2}, {"num_slices": 2, "fsdp": 2}])
def test_a_batch_is_split_over_data_and_fsdp_and_whole_on_tensor(sizes):
    mesh = make_mesh(**sizes)
    batch = {"image": np.arange(48, dtype=np.uint8).reshape(16, 3), "label": np.arange(16)}
    on_devices = to_devices(batch, mesh)
    for name, array in batch.items():
        np.testing.assert_array_equal(on_devices[name], array)
        assert on_devices[name].addressable_shards[0].data.shape[0] == 16 // batch_parts(mesh)
    np.testing.assert_array_equal(local_rows(16, mesh), np.arange(16))


def test_batches_are_a_multiple_of_the_parts_not_of_the_devices():
    mesh = make_mesh(fsdp=2, tensor=2)
    assert batch_parts(mesh) == 4
    assert round_up(9, mesh) == 12
    check_batch_size(12, 3, mesh)
    with pytest.raises(ValueError, match=r"batch_size=12 .* over 4 devices × accumulation_steps=2"):
        check_batch_size(12, 2, mesh)
