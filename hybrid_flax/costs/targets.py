"""Machines that are not here, as their compilers know them."""

import importlib.util
import os
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies

from hybrid_flax.errors import InputError

GIB = 2**30
MEMORY = {"v4": 32 * GIB, "v5e": 16 * GIB, "v5p": 95 * GIB, "v6e": 32 * GIB, "h200": 141e9}
MEMORY["cpu"] = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # this machine
_SQUARES = "1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"
_CUBES = "2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8, 4x8x8, 8x8x8, 8x8x16, 8x16x16"
SHAPES = {"v4": _CUBES, "v5e": _SQUARES, "v5p": _CUBES, "v6e": _SQUARES, "h200": "1 to 8"}
SHAPES["cpu"] = "1, or as many devices as XLA_FLAGS makes of this machine"
EXAMPLES = "v4:2x2x4, v5e:16x16, v5p:4x4x8, v6e:8x8, h200:8"

H200 = pathlib.Path(__file__).parent / "h200.textproto"


class Target(NamedTuple):
    """Machines as their compiler knows them."""

    name: str  # v5e:16x16
    chip: str
    platform: str  # "tpu", "cuda" or "cpu"
    devices: Sequence[jax.Device]  # of all slices

    @property
    def memory(self) -> float:
        """Bytes that a chip holds."""
        return MEMORY[self.chip]


def find_target(name: str, num_slices: int = 1) -> Target:
    """Looks up the machines of that name, so many slices of them.

    Raises:
      InputError: an unknown name, or their compiler is not installed.
    """
    chip, _, shape = name.partition(":")
    known = "\n".join(f"  {chip}: {shapes}" for chip, shapes in SHAPES.items())
    if chip not in MEMORY or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise InputError(
            f"--topology={name}: expected a chip and a shape, such as {EXAMPLES}. Known are\n"
            f"{known}"
        )
    if chip == "cpu":
        return _this_machine(name, shape)
    gpu = chip == "h200"
    needed, install = ("jax_cuda13_plugin", '"jax[cuda13]"') if gpu else ("libtpu", "libtpu")
    if importlib.util.find_spec(needed) is None:
        raise InputError(
            f"--topology={name}: its compiler is not installed here. Install it, no chip is "
            f"needed: pip install {install}"
        )
    try:
        if gpu:
            topology = topologies.get_topology_desc(
                platform="cuda",
                target_config=H200.read_text(),
                topology=f"{num_slices}x1x{int(shape)}",
            )
        else:
            slices = {"num_slices": num_slices} if num_slices > 1 else {}
            topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **slices)
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"--topology={name}: the compiler knows no such machines ({reason}). Among those it "
            f"knows are\n{known}"
        ) from error
    return Target(name, chip, "cuda" if gpu else "tpu", topology.devices)


def _this_machine(name: str, shape: str) -> Target:
    devices = jax.devices("cpu")
    if not shape.isdecimal() or not 1 <= int(shape) <= len(devices):
        raise InputError(
            f"--topology={name}: this machine counts as {len(devices)} device(s), cpu:1 to "
            f"cpu:{len(devices)}; for N: XLA_FLAGS=--xla_force_host_platform_device_count=N"
        )
    return Target(name, "cpu", "cpu", devices[: int(shape)])


def set_up() -> None:
    """Tells JAX, before it is used, that compilers are enough and no chip is looked for."""
    jax.config.update("jax_platforms", "cpu")  # with libtpu installed JAX would look for a TPU
    os.environ |= {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "TPU_SKIP_MDS_QUERY": "1"}
