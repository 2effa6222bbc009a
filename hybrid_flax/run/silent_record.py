"""What stands for a run's record in all processes but the first."""

import contextlib
from collections.abc import Sequence
from typing import Any

from hybrid_flax.run import files
from hybrid_flax.run.compiling import Made
from hybrid_flax.run.metrics import Numbers
from hybrid_flax.run.record import Results
from hybrid_flax.run.skipped_steps import NonFiniteStep, SkippedSteps
from hybrid_flax.run.workdir import stall_file


class SilentRecord:
    """Stands for the `Record` in processes that write and say nothing: the same methods."""

    def __init__(self, workdir: str):
        self.stall_file = stall_file(workdir)

    def __enter__(self) -> "SilentRecord":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def introduce(self, said: str, parameters: Any, memory: str) -> None:
        pass

    def write_classes(self, names: Sequence[str] | None) -> None:
        pass

    def newest_step(self) -> int | None:
        return None

    def restore(self, expected: Any) -> None:
        return None

    def clear_after(self, step: int) -> None:
        pass

    def check_space(self, state: Any) -> None:
        pass

    def save(
        self, step: int, state: Any, skipped: SkippedSteps, fingerprint: dict[str, Any]
    ) -> None:
        pass

    def finish(self, step: int, finished: bool) -> None:
        pass

    def training(self, step: int, total_steps: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def step(self, number: int) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def stepped(self, number: int, metrics: Any) -> None:
        pass

    def started(self, step: int, made: Made) -> None:
        pass

    def log(
        self,
        steps: Sequence[tuple[int, Numbers]],
        waited: Sequence[float],
        skipped: SkippedSteps,
        unreadable: int,
    ) -> None:
        pass

    def evaluated_steps(self) -> list[int]:
        return []

    def evaluation(self, step: int, results: Results, shown: str) -> None:
        pass

    def is_among_best(self, step: int) -> bool:
        return False

    def results(self, step: int) -> Results:
        return {}

    def account(self) -> str:
        return ""

    def interrupted(self, error: OSError) -> str:
        return files.explain(error)

    def non_finite(self, error: NonFiniteStep, images: dict[int, str]) -> str:
        return str(error)
