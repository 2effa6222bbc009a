"""Datasheet figures of devices, and the name of the first one's platform."""

import math
from typing import NamedTuple

import jax


class Chip(NamedTuple):
    """Datasheet figures of one device as JAX counts them."""

    flops: float  # per second, dense bfloat16 matrix products
    bandwidth: float  # bytes per second, of its main memory
    l1_bandwidth: float = math.inf  # bytes per second, of all its L1 caches; inf: no limit known


L1_HOPPER = 132 * 128 * 1.98e9  # SXM: multiprocessors, bytes a clock, clocks a second at most

# By `device_kind`; TPU chips go by two names. NVIDIA's figures are without sparsity.
CHIPS = {
    "NVIDIA H200": Chip(989.4e12, 4.8e12, L1_HOPPER),
    "NVIDIA H100 80GB HBM3": Chip(989.4e12, 3.35e12, L1_HOPPER),  # SXM
    "NVIDIA H100 PCIe": Chip(756e12, 2.0e12),
    "NVIDIA A100-SXM4-80GB": Chip(312e12, 2.039e12),
    **dict.fromkeys(("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), Chip(312e12, 1.555e12)),
    "TPU v4": Chip(275e12, 1.23e12),
    **dict.fromkeys(("TPU v5e", "TPU v5 lite"), Chip(197e12, 0.82e12)),
    **dict.fromkeys(("TPU v5p", "TPU v5"), Chip(459e12, 2.46e12)),
    **dict.fromkeys(("TPU v6e", "TPU v6 lite"), Chip(920e12, 1.64e12)),
}


def chip() -> Chip | None:
    """Looks up the first device; None where we have no figures for it."""
    return CHIPS.get(jax.devices()[0].device_kind)


def platform_name() -> str:
    """Names the first device's platform as `jax.lax.platform_dependent` does.

    "cuda", "rocm", "tpu", "cpu"; of other backends the name that JAX knows them by.
    """
    backend = jax.default_backend()
    if backend != "gpu":
        return backend
    return "rocm" if "rocm" in jax.devices()[0].client.platform_version.lower() else "cuda"
