"""Several processes that train together: starting, agreeing, and stopping together.

One process per host (or per GPU) runs the same program. JAX's coordination service, which the first
process hosts, introduces them, notices a process that is gone, and keeps a few texts for all; the
arrays of training never pass through it.
"""

import itertools
import json
import os
import platform
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

import jax
from jax._src.distributed import global_state  # the service's client has no public name yet

from hybrid_flax.errors import InputError, TrainingError

PATIENCE = 600.0  # seconds for the others to come to the same place of the program
_JOINING = 300.0  # seconds for all to be started
_POLL = 1.0  # seconds between looking for failures of others
_FAILED = "hybrid_flax/failed/"
_calls = itertools.count()


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    timeout: int = 60,
) -> None:
    """Joins the other processes, if there are any; before anything else asks JAX for devices.

    Without arguments JAX looks for a Cloud TPU slice, SLURM, Kubernetes and Open MPI; where there
    is none of them this process trains alone.

    Args:
      coordinator: "HOST:PORT" of the first process; HOST as the others see it, PORT free there.
      num_processes, process_id: how many, and which of them this is, from 0.
      timeout: seconds after which a process that is silent counts as gone and the others stop.

    Raises:
      InputError: some but not all arguments are given, the port is taken, or the cluster's
        description cannot be used. If the others do not come within 300 seconds, the process ends.
    """
    flags = {
        "coordinator": coordinator, "num_processes": num_processes, "process_id": process_id
    }  # fmt: skip
    given = [f"--{name}={value}" for name, value in flags.items() if value is not None]
    if 0 < len(given) < 3:
        raise InputError(
            f"{', '.join(given)}: --coordinator=HOST:PORT, --num_processes=N and --process_id=I "
            "belong together; give all three, or none where the cluster says them"
        )
    host = re.fullmatch(r".+:[1-9]\d{0,4}", coordinator or "")
    if given and not (host and 0 <= (process_id or 0) < (num_processes or 0)):
        raise InputError(
            f"{', '.join(given)}: expected HOST:PORT, and a process_id from 0 to below the number "
            "of processes"
        )
    if timeout < 5:
        raise InputError(
            f"--peer_timeout={timeout}: expected 5 seconds or more; a process that is merely busy "
            "must not count as gone"
        )
    if coordinator and process_id == 0:
        _check_free(coordinator)
    jax.config.update("jax_enable_preemption_service", False)  # it would take our SIGTERM
    # JAX itself would end with a stack trace, in which its reason is hard to find.
    giving_up = threading.Timer(_JOINING, _give_up, [process_id, num_processes, coordinator])
    giving_up.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            cluster_detection_method="deactivate" if coordinator else None,
            initialization_timeout=int(_JOINING) + 60,
            heartbeat_timeout_seconds=timeout,
            shutdown_timeout_seconds=timeout,
        )
    except ValueError as error:
        if "coordinator_address should be defined" in str(error):
            return  # no cluster: alone
        raise InputError(f"cannot join the other processes: {error}") from error
    except (RuntimeError, jax.errors.JaxRuntimeError) as error:
        raise InputError(
            f"cannot join the other processes: {str(error).splitlines()[0]}"
        ) from error
    finally:
        giving_up.cancel()
    if several():
        threading.Thread(
            target=_stop_with_others, args=[global_state.process_id], daemon=True
        ).start()


def _give_up(process_id: int | None, num_processes: int | None, coordinator: str | None) -> None:
    who = "this process" if process_id is None else f"process {process_id} of {num_processes}"
    where = coordinator or "the address that the cluster says"
    print(
        f"error: {who} waited {_JOINING:.0f} s for the others at {where}; were all started, with "
        "the same address, and can they reach it?",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def _check_free(coordinator: str) -> None:
    """Raises InputError if its port is taken here; JAX would end with a segmentation fault."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a run has just ended
        try:
            listener.bind(("", int(coordinator.rpartition(":")[2])))
        except (OSError, OverflowError) as error:
            raise InputError(
                f"--coordinator={coordinator}: process 0 cannot listen on this port ({error}); "
                "give all processes another one"
            ) from error


def several() -> bool:
    """Whether there are other processes; before devices are there, too."""
    return global_state.client is not None and global_state.num_processes > 1


def is_first() -> bool:
    """Whether this is the process that writes."""
    return jax.process_index() == 0


def name() -> str:
    """Of this process, as messages say it: "process 3 of 8 on host7"."""
    return f"process {jax.process_index()} of {jax.process_count()} on {platform.node()}"


# ------------------------------------------------------------------------------------ agreeing


def from_first(what: str, function: Callable[[], Any]) -> Any:
    """The result of `function()` in the first process, in all; something JSON can hold.

    An error there ends that process, and thereby all.
    """
    if jax.process_count() == 1:
        return function()
    mine = json.dumps(function()) if is_first() else ""
    return json.loads(everyone(what, mine)[0])


def everyone(what: str, text: str, patience: float = PATIENCE) -> list[str]:
    """A text of every process, in order, in every process.

    Args:
      what: said if somebody does not come.
      patience: seconds to wait for the others.

    Raises:
      TrainingError: not all came in time; says which.
    """
    if jax.process_count() == 1:
        return [text]
    # All processes come to the same calls in the same order.
    client, folder = _client(), f"hybrid_flax/call{next(_calls)}/"
    client.key_value_set(f"{folder}{jax.process_index()}", text)
    try:
        client.wait_at_barrier(folder, int(1000 * patience))
    except jax.errors.JaxRuntimeError as error:
        came = _texts(folder)
        missing = sorted(set(range(jax.process_count())) - came.keys())
        raise TrainingError(
            f"waited {patience:.0f} s to {what}: of {jax.process_count()} processes "
            f"{', '.join(map(str, missing)) or 'none'} did not come "
            f"({str(error).splitlines()[0]})"
        ) from error
    texts = _texts(folder)
    return [texts[i] for i in range(jax.process_count())]


def _client() -> Any:
    """The connection to the coordination service, of a process that has joined others."""
    return global_state.client


def _texts(folder: str) -> dict[int, str]:
    found = _client().key_value_dir_get(folder)
    return {int(key.rpartition("/")[2]): text for key, text in found}


# ------------------------------------------------------------------------------------ stopping


def leave(code: int, reason: str) -> NoReturn:
    """Ends this process for an error, and all others within seconds, which say whose it was."""
    sys.stdout.flush()
    sys.stderr.flush()
    if several():
        failure = json.dumps({"name": name(), "code": code, "reason": reason})
        try:
            _client().key_value_set(f"{_FAILED}{jax.process_index()}", failure)
        except jax.errors.JaxRuntimeError:
            pass  # the service is gone, and so is the first process
        if is_first():
            time.sleep(3 * _POLL)  # the others ask us
    # Not the usual way out, which waits for the others, who wait for us in a collective.
    os._exit(code)


def _stop_with_others(mine: int) -> None:
    while global_state.client is not None:
        time.sleep(_POLL)
        try:
            failures = _texts(_FAILED)
        except (AttributeError, jax.errors.JaxRuntimeError):
            continue  # we are done; or the service stays away, then JAX itself ends us
        failures.pop(mine, None)
        if failures:
            failure = json.loads(failures[min(failures)])
            print(f"error: {failure['name']} stopped: {failure['reason']}", file=sys.stderr)
            sys.stderr.flush()
            if mine == 0:
                time.sleep(3 * _POLL)
            os._exit(failure["code"])
