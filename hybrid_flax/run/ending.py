"""How every program ends: a status, and a line that a user can read, never a traceback.

Needs JAX and no other package, for programs that are to run with little more.
"""

import contextlib
import sys
import traceback
from collections.abc import Callable

import jax

from hybrid_flax.distributed import processes
from hybrid_flax.errors import InputError, TrainingError
from hybrid_flax.run import files
from hybrid_flax.run.output import attended
from hybrid_flax.run.stop_signal import Stopped
from hybrid_flax.run.supervision import supervised
from pallas.dispatch import UnservedShapeError


def ending(program: Callable[[], int | None], *, limited: bool = True) -> int | None:
    """The exit status of a program, which is watched from here on: see `supervised`.

    Without `limited` the watchdog leaves it alone: what it does gives no signs of life.

    It is what `program()` returns; 2 for input that the user can mend, 1 for training that had to
    stop and files that cannot be written, 128 + the signal after a stop that was asked for.
    What is wrong is said in one line, `error: …`.
    """
    try:
        with supervised() as watch, attended(watch.stop):
            if not limited:
                watch.watchdog.seconds = 0
            try:
                status = program()
            except SystemExit:  # as of --help, which may be too long for a pipe
                sys.stdout.flush()
                raise
            sys.stdout.flush()
            return status
    except (InputError, TrainingError, UnservedShapeError) as error:
        return leave(1 if isinstance(error, TrainingError) else 2, str(error))
    except OSError as error:
        return leave(1, files.explain(error))
    except Stopped as stopped:
        return leave(stopped.status, str(stopped), is_error=False)
    except Exception as error:
        if not processes.several():
            if reason := _no_devices():
                return leave(2, reason)
            raise
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, jax.errors.JaxRuntimeError) and "connection" in reason.lower():
            reason = f"the connection to another process is lost, see its log ({reason})"
        return leave(1, reason)


def _no_devices() -> str:
    """Why JAX has none of the devices that it was told to use; "" where it has."""
    try:
        jax.devices()
    except Exception as error:  # RuntimeError, or an assertion of JAX
        asked = jax.config.jax_platforms or ""  # type: ignore[attr-defined]  # it has
        said = " ".join(str(error).split())[:200] or "there are none"
        return f"JAX has no devices with JAX_PLATFORMS={asked}: {said}"
    return ""


def leave(status: int, reason: str, *, is_error: bool = True) -> int:
    """Says why a program ends, in one line on stderr; gives the status."""
    whose = f"{processes.name()}: " if processes.several() else ""
    with contextlib.suppress(OSError):
        print(f"{whose}{'error: ' if is_error else ''}{reason}", file=sys.stderr, flush=True)
    return processes.leave(status, reason) if processes.several() else status
