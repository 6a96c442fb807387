"""When the processes wait for each other, because one of them may have worked alone for long."""

from __future__ import annotations

from collections.abc import Iterable

from dreamlora.interfaces import StepResult
from dreamlora.processes import wait_for_everyone
from dreamlora.training.loop import Run


class MeetCallback:
    """Waits after the steps at which others draw, measure and save: the main process does a part of that alone.

    Comes last. Without it the next step's gradients would wait, and a collective is given up after 10 minutes.

    Args:
        every: steps between two times, of each of the others.
    """

    def __init__(self, every: Iterable[int | None]) -> None:
        self._every = [steps for steps in every if steps]

    def on_start(self, run: Run) -> None:
        """The base model has been drawn and measured, and trackers have started."""
        wait_for_everyone()

    def on_step(self, run: Run, result: StepResult) -> None:
        """Wait if anything else was due."""
        if run.step == run.total_steps or any(run.step % steps == 0 for steps in self._every):
            wait_for_everyone()

    def on_end(self, run: Run) -> None:
        """Nothing: the end of a run waits itself."""
