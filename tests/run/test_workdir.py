import errno
import os

import pytest

from hybrid_flax.run.workdir import Workdir
from tests import tiny


def enter(folder):
    with Workdir(str(folder), tiny.settings()) as run:
        return run


def test_what_cannot_be_written_renamed_or_read_back_is_found_first(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(
            ValueError,
            match=rf"cannot write to the work directory {tmp_path}: Disk quota exceeded. Choose "
            "another --workdir, or mend its permissions, quota or disk",
        ):
            enter(tmp_path)
    with monkeypatch.context() as patch:
        write = Workdir.write_text
        patch.setattr(Workdir, "write_text", lambda self, name, text: write(self, name, text[:5]))
        with pytest.raises(
            ValueError,
            match=r"does not give back what was written to it \(128 characters, 5 read\). Choose",
        ):
            enter(tmp_path)


def test_the_probe_leaves_nothing(tmp_path):
    enter(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".lock", "config.json", "versions.json"]
