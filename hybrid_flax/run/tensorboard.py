"""Numbers for TensorBoard, written at once: what `metrics.jsonl` has, it has.

tensorboardX, whose records these are, writes them from a thread every two minutes: a kill loses
what was measured meanwhile, and a full disk ends the thread, for which everybody then waits.
"""

import os
import socket
import struct
import time
from typing import Any

from hybrid_flax.run import files


class TensorBoard:
    """Appends to an event file of this start, made with its first numbers.

    Args:
      folder: of the run.
      start_step: the step that it starts after: TensorBoard leaves out what it was told of later
        ones before.
    """

    def __init__(self, folder: str, start_step: int):
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        self._file = os.path.join(folder, name)
        self._start_step = start_step
        self._begun = False

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Adds numbers of a step; raises OSError."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=x) for name, x in numbers.items()]
        now = time.time()
        events = [Event(wall_time=now, step=step, summary=Summary(value=values))]
        if not self._begun:
            begin = SessionLog(status=SessionLog.START)
            events = [
                Event(wall_time=now, file_version="brain.Event:2"),
                Event(wall_time=now, step=self._start_step + 1, session_log=begin),
                *events,
            ]
        files.append(self._file, b"".join(map(_framed, events)))
        self._begun = True


def _framed(event: Any) -> bytes:
    """An event as a record: its length, that one's checksum, the event, its checksum."""
    from tensorboardX.record_writer import masked_crc32c

    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    return b"".join(
        (
            length,
            struct.pack("<I", masked_crc32c(length)),
            data,
            struct.pack("<I", masked_crc32c(data)),
        )
    )
