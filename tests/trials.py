"""Thousands of odd inputs at the product's doors: each is used, or refused by a message.

python -m tests.trials [--inputs=3000] [--seed=0] [KIND …]

An input is a good one with a few changes: flipped bits, pieces cut out, doubled or exchanged; or a
value of another type. It counts as *used* where the door took it, as *refused* where an InputError
named the file, field or member, and as a *failure* otherwise: another exception, a refusal that
names nothing, a process that died, or one that took more than half a minute.

Every kind runs in processes of its own, started anew after one that died.
"""

import argparse
import collections
import contextlib
import io
import logging
import multiprocessing
import os
import pathlib
import sys
import tempfile
import time
import traceback
import warnings
from typing import Any, NamedTuple

from hybrid_flax.errors import InputError
from hybrid_flax.run.ending import ending
from tests.trial_inputs import KINDS, Trial

SECONDS = 30  # that one input may take
USED, REFUSED, FAILED = "used", "refused", "failures"


class Failure(NamedTuple):
    kind: str
    number: int  # of the input: seed and number make it again
    reason: str


def outcome(kind: str, number: int, seed: int, folder: pathlib.Path) -> tuple[str, str]:
    """(USED, REFUSED or FAILED, why) for one input."""
    trial: Trial = KINDS[kind](f"{seed}/{kind}/{number}", folder)
    try:
        trial.use()
    except InputError as error:
        said = str(error)
        if any(name in said for name in trial.names):
            return REFUSED, said
        return FAILED, f"refused without naming {' or '.join(trial.names)}: {said[:300]}"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{pathlib.Path(last.filename).name}:{last.lineno}"
        return FAILED, f"{type(error).__name__} at {where}: {str(error)[:300]}"
    return USED, ""


def run(
    kind: str, inputs: int, seed: int, first: int = 0
) -> tuple[collections.Counter, list[Failure]]:
    """Tries so many inputs of a kind."""
    counts: collections.Counter = collections.Counter()
    failures = []
    os.environ.setdefault("TQDM_DISABLE", "1")  # of the children, before they import it
    context = multiprocessing.get_context("spawn")
    while first < inputs:
        receive, send = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(kind, first, inputs, seed, send))
        child.start()
        send.close()
        reason = "the process died"
        try:
            while first < inputs:
                if not receive.poll(SECONDS + 60 * (child.exitcode is None and not counts)):
                    reason = f"not done after {SECONDS} s"
                    break
                what, why = receive.recv()
                counts[what] += 1
                if what == FAILED:
                    failures.append(Failure(kind, first, why))
                first += 1
        except EOFError:
            pass
        child.kill()
        child.join()
        if first < inputs:
            if child.exitcode and child.exitcode != -9:
                reason += f" with status {child.exitcode}"
            counts[FAILED] += 1
            failures.append(Failure(kind, first, reason))
            first += 1
    return counts, failures


def _child(kind: str, first: int, inputs: int, seed: int, send: Any) -> None:
    logging.disable()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        for number in range(first, inputs):
            own = pathlib.Path(folder, str(number))
            own.mkdir()
            send.send(outcome(kind, number, seed, own))


def table(found: dict[str, collections.Counter]) -> str:
    """The counts as a table in Markdown."""
    lines = ["| input | tried | used | refused | failures |", "|---|---|---|---|---|"]
    total: collections.Counter = collections.Counter()
    for kind, counts in found.items():
        total += counts
        lines.append(_row(kind, counts))
    return "\n".join([*lines, _row("all", total)])


def _row(kind: str, counts: collections.Counter) -> str:
    return f"| {kind} | {counts.total()} | {counts[USED]} | {counts[REFUSED]} | {counts[FAILED]} |"


def main(arguments: list[str] | None = None) -> int:
    return ending(lambda: _main(arguments), limited=False) or 0


def _main(arguments: list[str] | None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--inputs", type=int, default=3000, help="of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    unknown = set(options.kinds) - set(KINDS)
    if unknown or options.inputs < 1:
        parser.error(f"unknown kind {', '.join(unknown)}" if unknown else "--inputs: from 1")
    kinds = options.kinds or list(KINDS)
    found, failures = {}, []
    for kind in kinds:
        start = time.monotonic()
        found[kind], failed = run(kind, -(-options.inputs // len(kinds)), options.seed)
        failures += failed
        print(f"{kind}: {dict(found[kind])}, {time.monotonic() - start:.0f} s", file=sys.stderr)
    print(table(found))
    for failure in failures:
        print(f"{failure.kind} {failure.number}: {failure.reason}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
