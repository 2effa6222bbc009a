"""What the programs that take --config and --workdir share: their flags, read and checked."""

import functools
import itertools
import os
import stat
import sys
import textwrap
import traceback
from collections.abc import Callable
from typing import Any

import ml_collections
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from hybrid_flax.distributed import processes
from hybrid_flax.errors import InputError
from hybrid_flax.run import compilation_cache
from hybrid_flax.run.compiling import exit_with
from hybrid_flax.run.ending import ending, leave
from hybrid_flax.run.phases import seconds_of_process
from hybrid_flax.run.supervision import supervised
from hybrid_flax.settings import DROPPED, FIELDS, RENAMED, old_name
from hybrid_flax.settings.arguments import override, take_overrides, with_found_config, with_home

_HELP = ("-h", "-help", "--help", "-?", "--?", "--helpshort", "--helpfull")


def run(
    main: Callable[[Any, str], int | None],
    *,
    needs_config: bool = True,
    needs_workdir: bool = True,
    in_parallel: bool = False,
    cache_of_user: bool = True,
) -> None:
    """Runs `main(config, workdir)` of a program that takes --config and --workdir.

    Without `needs_config` the former may be missing, and is None then; without `needs_workdir` the
    latter, and is "". With `in_parallel` it may run as several processes, on one or many hosts:
    they are joined before `main`, only the first prints, and an error of one ends all.

    Compiled programs are kept in the user's cache or where --compilation_cache says; without
    `cache_of_user` it is `main` that has to see to that.

    Exits as `ending` says.
    """
    sys.argv = with_home(sys.argv)
    try:
        given, overrides = take_overrides(_in_present_names(sys.argv))
        given = with_found_config(given)
    except InputError as error:
        raise SystemExit(leave(2, str(error))) from None
    config_flag = config_flags.DEFINE_config_file(
        "config",
        None,
        "Config file, such as configs/gcvit_b.py. Its fields: --config.optimizer.learning_rate=…, "
        "all of them in docs/settings.md.",
        sys_argv=given,
    )
    workdir_flag = flags.DEFINE_string("workdir", None, "Folder of the run.")
    cache_flag = flags.DEFINE_string("compilation_cache", None, compilation_cache.HELP)
    if in_parallel:
        _define_process_flags()

    def program(arguments: list[str]) -> int | None:
        absl_logging.set_verbosity(absl_logging.WARNING)
        if arguments[1:]:
            raise InputError(f"unexpected argument {arguments[1]!r}; flags begin with --")
        has_config = needs_config or config_flag.value is not None
        config = _config(config_flag) if has_config else None
        if config is not None:
            override(config, overrides)
        with supervised() as watch:
            known = sum(watch.phases.seconds().values())
            watch.phases.count("import", max(0.0, seconds_of_process() - known))
            seconds: Any = config.get("watchdog_seconds") if config else None
            if FIELDS["watchdog_seconds"].expected.fits(seconds):
                watch.watchdog.seconds = seconds
        if needs_workdir and not workdir_flag.value:
            raise InputError("--workdir is missing")
        if in_parallel:
            _join()
        if not cache_of_user:
            return main(config, workdir_flag.value or "")
        with compilation_cache.cached(cache_flag.value, compilation_cache.user_folder()):
            return main(config, workdir_flag.value or "")

    def begin() -> int | None:
        try:
            app.run(program, argv=given, flags_parser=_parse_flags)
        except SystemExit as end:
            return end.code  # type: ignore[return-value]  # of ours
        return 0

    exit_with(ending(begin))


def given_fields() -> list[str]:
    """Names of the fields that the command line sets: "model.image_size" for --config.model.…=."""
    flags_given = (argument.partition("=")[0].lstrip("-") for argument in sys.argv[1:])
    names = (flag.removeprefix("no") for flag in flags_given)  # --noconfig.dataset.cache
    fields = (name.removeprefix("config.") for name in names if name.startswith("config."))
    return [RENAMED.get(field, field) for field in fields]


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


def _parse_flags(arguments: list[str]) -> list[str]:
    if any(argument in _HELP for argument in arguments[1:]):
        _print_help()
        raise SystemExit(0)
    file = _config_file()
    if os.path.exists(file) and not stat.S_ISREG(os.stat(file).st_mode):
        raise InputError(f"--config={file}: expected a file, such as configs/gcvit_b.py")
    try:
        return flags.FLAGS(arguments)
    except flags.Error as error:
        raise InputError(str(_cause(error))) from error
    except (AttributeError, KeyError) as error:  # ml_collections: no such field
        if _place_in_config(error):
            raise _unusable(error) from error
        message = str(error.args[0]).replace("\n", ". ")
        raise InputError(f"--config has no such field: {message}") from error
    except Exception as error:  # whatever the config file did
        raise _unusable(error) from error


def _config_file() -> str:
    """What --config names, without what follows the colon; "" if it is not there."""
    for argument, following in itertools.zip_longest(sys.argv[1:], sys.argv[2:], fillvalue=""):
        name, given, value = argument.partition("=")
        if name in ("--config", "-config"):
            return (value if given else following).partition(":")[0]
    return ""


def _place_in_config(error: BaseException) -> int | None:
    """The line of the config file at which an error came up, if it was there."""
    file = os.path.realpath(_config_file())
    if isinstance(error, SyntaxError) and error.filename:
        return error.lineno if os.path.realpath(error.filename) == file else None
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if os.path.realpath(frame.filename) == file]
    return lines[-1] if lines else None


def _unusable(error: BaseException) -> InputError:
    place = _place_in_config(error)
    said = error.msg if isinstance(error, SyntaxError) else str(error)
    return InputError(
        f"the config file {_config_file()} cannot be used"
        + (f", see its line {place}" if place else "")
        + f": {type(error).__name__}: {said}"
    )


def _print_help() -> None:
    """Absl's own --help leaves out what is defined here, and ends with 1."""
    wrap = functools.partial(
        textwrap.fill, width=98, initial_indent="  ", subsequent_indent=" " * 6,
        break_on_hyphens=False,
    )  # fmt: skip
    print(sys.modules["__main__"].__doc__ or "")
    print("Flags:")
    for module in (__name__, sys.argv[0]):  # the latter is how absl calls the main one
        for flag in flags.FLAGS.get_key_flags_for_module(module):
            name = f"--[no]{flag.name}" if flag.boolean else f"--{flag.name}"
            default = "" if flag.default in (None, "") else f" (default: {flag.default})"
            print(wrap(f"{name}: {flag.help}{default}"))


def _cause(error: BaseException) -> BaseException:
    """The InputError that a config file raised: ml_collections and absl wrap it in their own."""
    found: BaseException = error
    link: BaseException | None = error
    while link:
        if isinstance(link, InputError):
            found = link
        link = link.__cause__ or link.__context__
    return found


def _config(flag: Any) -> ml_collections.ConfigDict:
    if flag.value is None:
        raise InputError("--config is missing; to try: --config=configs/quickstart.py")
    try:
        flag.value.keys()
    except OSError as error:
        raise InputError(f"cannot read the config file: {error}") from error
    except InputError:
        raise
    except Exception as error:  # whatever the config file did
        raise _unusable(error) from error
    return flag.value
