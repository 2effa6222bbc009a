"""When a run logs, evaluates and saves: a function of the step alone."""

from typing import NamedTuple

from hybrid_flax.settings import Settings


class Due(NamedTuple):
    """What is to be done at a step, in this order."""

    log: bool  # what is known by then: the metrics of the steps before it
    save: bool
    evaluate: bool


class Cadence(NamedTuple):
    """How often a run logs, saves and evaluates, in steps, and how many steps it has."""

    total_steps: int
    log_every: int
    save_every: tuple[int, ...]  # at multiples of any of them; 0: none
    evaluate_every: int

    @classmethod
    def from_config(cls, config: Settings, steps_per_epoch: int) -> "Cadence":
        return cls(
            total_steps=config.epochs * steps_per_epoch,
            log_every=config.log_every_steps,
            save_every=(config.checkpoint.every_steps, config.checkpoint.keep_every_steps),
            evaluate_every=config.eval.every_epochs * steps_per_epoch,
        )

    def at(self, step: int) -> Due:
        """Says what is due when `step` steps are done; at step 0 nothing, at the last all."""
        if step == 0:
            return Due(False, False, False)
        last = step == self.total_steps
        return Due(
            # One step late, and so from the second on: the devices must never wait for the host.
            log=(step - 1) % self.log_every == 0,
            save=last or any(every and step % every == 0 for every in self.save_every),
            evaluate=last or step % self.evaluate_every == 0,
        )
