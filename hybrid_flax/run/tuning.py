"""What XLA found by timing on GPUs (autotuning), kept beside the compiled programs.

Without it two starts may choose other kernels, whose last bits differ. XLA reads and writes files
in a folder whose path JAX takes for a part of the program: it is the same at every start.
"""

import hashlib
import json
import os
import pathlib
import tempfile

from hybrid_flax.run.storage.bucket import files_in
from hybrid_flax.run.storage.entries import make_private, write_whole


class Tuning:
    """The folder of XLA, and what is in it as one text.

    Args:
      place: of the compiled programs.

    Raises (and so do its methods):
      OSError: the folder cannot be made or written, or others may write to it.
    """

    def __init__(self, place: str):
        name = hashlib.sha256(place.encode()).hexdigest()[:16]
        top = os.path.join(tempfile.gettempdir(), f"hybrid_flax-{os.geteuid()}")
        self.folder = os.path.join(top, name)
        make_private(top)
        make_private(self.folder)

    def unpack(self, packed: bytes | None) -> None:
        """Writes the files that `pack` packed, if any."""
        for name, text in json.loads(packed or "{}").items():
            file = os.path.join(self.folder, name)
            os.makedirs(os.path.dirname(file), exist_ok=True)
            write_whole(file, text.encode("latin-1"))

    def pack(self) -> bytes:
        """The content of all files that XLA has written, by name."""
        found = {
            name: pathlib.Path(self.folder, name).read_bytes().decode("latin-1")
            for name in sorted(files_in(self.folder))
            if not name.endswith(".tmp")
        }
        return json.dumps(found).encode()
