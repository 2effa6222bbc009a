import numpy as np

from hybrid_flax.distributed.batch import to_devices
from hybrid_flax.distributed.mesh import make_mesh
from hybrid_flax.run import supervision
from hybrid_flax.run.phases import Phases
from hybrid_flax.run.supervision import supervised
from hybrid_flax.sign_of_life import alive


def test_within_a_program_a_run_is_watched_by_what_watches_the_program():
    with supervised() as outer:
        with supervised() as inner:
            assert inner is outer
        assert outer.watchdog.seconds == 900
        assert outer.phases.silence()[0] == "start"
    with supervised() as later:
        assert later.phases is not outer.phases


def test_every_batch_is_a_sign_of_life_whatever_the_program(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(supervision, "Phases", lambda: Phases(lambda: next(clock)))
    mesh = make_mesh()
    with supervised() as watch:  # at 0; the watchdog looks once a second
        watch.watchdog.seconds = 0
        watch.phases.silence()
        before = watch.phases._sign[1]
        to_devices({"image": np.zeros((mesh.size, 2), np.uint8)}, mesh)
        assert watch.phases._sign[1] > before
        assert watch.phases.silence()[2]  # what comes next may still be done for the first time
    alive()  # nobody listens
