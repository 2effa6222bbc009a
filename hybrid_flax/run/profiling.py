"""Recording what devices and host do at some steps: --profile=10:15 of `hybrid_flax.main`."""

import contextlib
import logging
import os
import re
from typing import Any

import jax

from hybrid_flax.errors import InputError


class Profile:
    """Records steps FIRST to LAST, both included, with `jax.profiler`.

    Steps that were done before this process started are not recorded.

    Args:
      steps: "FIRST:LAST", counted from 1; "" records nothing.
      folder: where to; one record for each process that has one, to be looked at with XProf.

    Raises:
      InputError: no such steps.
    """

    def __init__(self, steps: str, folder: str):
        match = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", steps)
        self._first, self._last = map(int, match.groups()) if match else (0, 0)
        if steps and not 1 <= self._first <= self._last:
            raise InputError(
                f"--profile={steps}: expected the first and the last step to record, counted from "
                "1, such as 10:15"
            )
        self._folder = folder
        self._recording = False
        self._begun = 0

    def step(self, number: int) -> contextlib.AbstractContextManager:
        """Around the call of that step; begins the record if it is the first to be in it."""
        if not self._recording and self._first <= number <= self._last:
            os.makedirs(self._folder, exist_ok=True)
            jax.profiler.start_trace(self._folder)
            self._recording, self._begun = True, number
        self._number = number
        return jax.profiler.StepTraceAnnotation("train", step_num=number)

    def after(self, number: int, results: Any) -> None:
        """Ends the record if that was the last step in it.

        Args:
          results: of the step, to wait for: devices work behind the host.
        """
        if self._recording and number == self._last:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Ends the record, if the run ends within it; says so if there was none."""
        if self._recording:
            jax.profiler.stop_trace()
            self._recording = False
            print(f"recorded steps {self._begun} to {self._number} in {self._folder}")
        elif self._last and not self._begun:
            logging.warning(
                "--profile=%d:%d recorded nothing: none of these steps was done by this process",
                self._first,
                self._last,
            )
