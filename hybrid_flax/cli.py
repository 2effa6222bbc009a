"""What the command-line programs share: flags, and errors that a user can read."""

import os
import sys
import traceback
from collections.abc import Callable

import jax
import ml_collections
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from hybrid_flax.distributed import processes
from hybrid_flax.errors import InputError, TrainingError
from hybrid_flax.settings import DROPPED, RENAMED, old_name
from hybrid_flax.settings.arguments import override, take_overrides, with_found_config
from pallas.dispatch import UnservedShapeError


def run(
    main: Callable[[ml_collections.ConfigDict, str], int | None],
    *,
    needs_workdir: bool = True,
    in_parallel: bool = False,
) -> None:
    """Runs `main(config, workdir)` of a program that takes --config and --workdir.

    Without `needs_workdir` the latter may be missing, and is "" then. With `in_parallel` it may
    run as several processes, on one or many hosts: they are joined before `main`, only the first
    prints, and an error of one ends all.

    Exits with what it returns; with 2 for input that the user can mend, 1 for training that had to
    stop.
    """
    given, overrides = take_overrides(_in_present_names(sys.argv))
    try:
        given = with_found_config(given)
    except InputError as error:
        _say(str(error))
        raise SystemExit(2) from None
    config_flag = config_flags.DEFINE_config_file(
        "config",
        None,
        "Config file, such as configs/gcvit_b.py; fields: --config.optimizer.…=…",
        sys_argv=given,
    )
    workdir_flag = flags.DEFINE_string("workdir", None, "Folder of the run.")
    if in_parallel:
        _define_process_flags()

    def program(arguments: list[str]) -> int | None:
        absl_logging.set_verbosity(absl_logging.WARNING)
        try:
            if arguments[1:]:
                raise InputError(f"unexpected argument {arguments[1]!r}; flags begin with --")
            config = _config(config_flag)
            override(config, overrides)
            if needs_workdir and not workdir_flag.value:
                raise InputError("--workdir is missing")
            if in_parallel:
                _join()
            return main(config, workdir_flag.value or "")
        except (InputError, TrainingError, UnservedShapeError) as error:
            code = 1 if isinstance(error, TrainingError) else 2
            _say(str(error))
            return processes.leave(code, str(error)) if processes.several() else code
        except Exception as error:
            if not processes.several():
                raise
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
            if isinstance(error, jax.errors.JaxRuntimeError) and "connection" in reason.lower():
                reason = f"the connection to another process is lost, see its log ({reason})"
            _say(reason)
            processes.leave(1, reason)

    app.run(program, argv=given, flags_parser=_parse_flags)


def _in_present_names(arguments: list[str]) -> list[str]:
    """Translates fields of --config that the version before this one called otherwise."""
    present = []
    for argument in arguments:
        flag, given, value = argument.partition("=")
        name = flag.lstrip("-").removeprefix("config.")
        if flag.startswith("-") and (name in RENAMED or name in DROPPED):
            print(f"warning: {old_name(name)}", file=sys.stderr)
            if name in RENAMED:
                present.append(f"--config.{RENAMED[name]}{given}{value}")
        else:
            present.append(argument)
    return present


def _define_process_flags() -> None:
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0; only without a cluster.")
    flags.DEFINE_integer("num_processes", None, "How many processes train together.")
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
    flags.DEFINE_integer(
        "peer_timeout", 60, "Seconds of silence after which a process counts as gone, and all stop."
    )


def _join() -> None:
    given = flags.FLAGS
    processes.start(
        given.coordinator, given.num_processes, given.process_id, timeout=given.peer_timeout
    )
    if not processes.is_first():
        sys.stdout = open(os.devnull, "w")  # one log; errors and warnings go elsewhere


def _say(error: str) -> None:
    whose = f"{processes.name()}: " if processes.several() else ""
    print(f"{whose}error: {error}", file=sys.stderr)


def _parse_flags(arguments: list[str]) -> list[str]:
    try:
        return flags.FLAGS(arguments)
    except flags.Error as error:
        message = str(_cause(error))
    except (AttributeError, KeyError) as error:  # ml_collections: no such field
        message = "--config has no such field: " + str(error.args[0]).replace("\n", ". ")
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def _cause(error: BaseException) -> BaseException:
    """The InputError that a config file raised: ml_collections and absl wrap it in their own."""
    found, link = error, error
    while link:
        if isinstance(link, InputError):
            found = link
        link = link.__cause__ or link.__context__
    return found


def _config(flag) -> ml_collections.ConfigDict:
    if flag.value is None:
        raise InputError("--config is missing; to try: --config=configs/quickstart.py")
    try:
        flag.value.keys()
    except OSError as error:
        raise InputError(f"cannot read the config file: {error}") from error
    return flag.value
