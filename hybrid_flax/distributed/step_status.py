"""What all processes know of each other at a step: who is asked to stop, who waits for input.

A process that acts on its own signal would leave the others waiting in a collective. So every step
is followed by a tiny gather of a few numbers per process, read one step later, when the device is
through with it: at the same step, all processes read the same.
"""

import signal
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hybrid_flax.distributed.mesh import AXES, replicated


class StepStatus(NamedTuple):
    """Of all processes, at one step."""

    stop: signal.Signals | None  # that one of them received
    waited: list[float]  # seconds each of them has waited for input so far


class StatusExchange:
    """Says at every step what is known of all processes; each has to ask equally often."""

    def __init__(self, mesh: Mesh):
        self._alone = jax.process_count() == 1
        self._shape = (mesh.size, 2)
        self._split = NamedSharding(mesh, PartitionSpec(AXES))
        self._gather = jax.jit(lambda rows: rows, out_shardings=replicated(mesh))
        owners = [device.process_index for device in mesh.devices.flat]
        self._rows = [owners.index(process) for process in range(jax.process_count())]
        self._pending: jax.Array | None = None

    def at_step(self, stop: signal.Signals | None, waited: float) -> StepStatus:
        """Tells the others this, and returns what all told one call earlier (alone: now)."""
        mine = np.array([[stop or 0, waited]], np.float32)
        if self._alone:
            return StepStatus(stop, [waited])
        told = jax.make_array_from_callback(self._shape, self._split, lambda _: mine)
        before, self._pending = self._pending, self._gather(told)
        if before is None:
            return StepStatus(None, [0.0] * len(self._rows))
        rows = np.asarray(before.addressable_data(0))[self._rows]
        received = int(rows[:, 0].max())
        return StepStatus(signal.Signals(received) if received else None, rows[:, 1].tolist())
