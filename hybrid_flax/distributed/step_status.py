"""The status of all processes at a step: who is asked to stop, and who waits for input.

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
from hybrid_flax.distributed.transfer import from_parts


class StepStatus(NamedTuple):
    """The status of all processes at one step."""

    stop: signal.Signals | None  # that one of them received
    waited: list[float]  # seconds each of them has waited for input so far


class StatusExchange:
    """Says at every step what is known of all processes; each has to ask equally often.

    Attributes:
      last: what was said at the last step.
    """

    def __init__(self, mesh: Mesh):
        self._alone = jax.process_count() == 1
        self._shape = (mesh.size, 2)
        self._split = NamedSharding(mesh, PartitionSpec(AXES))
        self._gather = jax.jit(lambda rows: rows, out_shardings=replicated(mesh))
        owners = [device.process_index for device in mesh.devices.flat]
        self._rows = [owners.index(process) for process in range(jax.process_count())]
        self._pending: jax.Array | None = None
        self.last = StepStatus(None, [0.0] * len(self._rows))

    def at_step(self, stop: signal.Signals | None, waited: float) -> StepStatus:
        """Tells the others this, and returns what all told one call earlier (alone: now)."""
        if self._alone:
            self.last = StepStatus(stop, [waited])
            return self.last
        mine = np.array([[stop or 0, waited]], np.float32)
        told = from_parts(self._shape, self._split, lambda _: mine)
        before, self._pending = self._pending, self._gather(told)
        if before is not None:
            rows = jax.device_get(before.addressable_data(0))[self._rows]
            received = int(rows[:, 0].max())
            stop = signal.Signals(received) if received else None
            self.last = StepStatus(stop, rows[:, 1].tolist())
        return self.last
