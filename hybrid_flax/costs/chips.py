"""Datasheet figures of the devices, and what the first one is called."""

import math
from typing import NamedTuple

import jax


class Chip(NamedTuple):
    """Datasheet figures of one device as JAX counts them."""

    flops: float  # per second, dense bfloat16 matrix products
    bandwidth: float  # bytes per second, of its main memory
    l1_bandwidth: float = math.inf  # bytes per second, of all its L1 caches; inf: no limit known


L1_H200 = 132 * 128 * 1.98e9  # multiprocessors, bytes a clock, clocks a second at most

# By `device_kind`; TPU chips go by two names.
CHIPS = {
    "NVIDIA H200": Chip(989.5e12, 4.8e12, L1_H200),
    "TPU v4": Chip(275e12, 1.23e12),
    **dict.fromkeys(("TPU v5e", "TPU v5 lite"), Chip(197e12, 0.82e12)),
    **dict.fromkeys(("TPU v5p", "TPU v5"), Chip(459e12, 2.46e12)),
    **dict.fromkeys(("TPU v6e", "TPU v6 lite"), Chip(920e12, 1.64e12)),
}


def chip() -> Chip | None:
    """Of the first device; None where we have no figures for it."""
    return CHIPS.get(jax.devices()[0].device_kind)


def platform_name() -> str:
    """Of the first device, as `jax.lax.platform_dependent` calls it: "cuda", "tpu", "cpu"."""
    backend = jax.default_backend()
    return "cuda" if backend == "gpu" else backend
