"""TPU compilers take the kernels of every shape, where libtpu is installed; see `make kernels`."""

import importlib.util

import pytest

from tests.pallas.cases import model_geometries

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="needs libtpu, the TPU compiler: `make kernels` installs it",
    ),
]


@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e"])
@pytest.mark.parametrize(
    "model",
    [
        "gcvit_b",
        "l2vit_b",
        "ga_cswin_s",
        "unified_swin_base",
        "unified_halonet_base",
        "unified_internimage_base",
    ],
)
def test_every_shape_compiles(model, chip):
    from tests.compile_kernels import compile_for_tpu

    for geometry in model_geometries(model):
        assert set(compile_for_tpu(geometry, chip)) == {"forward", "backward"}
