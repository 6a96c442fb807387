"""When the processes wait for each other, because one of them may have worked alone for long."""

from __future__ import annotations

from dreamlora.interfaces import StepResult
from dreamlora.processes import wait_for_everyone
from dreamlora.training.loop import Run, is_due


class MeetCallback:
    """Waits after the steps on which others draw, measure and save: the main process does a part of that alone.

    Comes last. Without it the next step's gradients would wait, and a collective is given up after 10 minutes.

    Args:
        saved_every: steps between two checkpoints; 0: none.
    """

    def __init__(self, saved_every: int) -> None:
        self._saved_every = saved_every

    def on_start(self, run: Run) -> None:
        """The base model has been drawn and measured, and trackers have started."""
        wait_for_everyone()

    def on_step(self, run: Run, result: StepResult) -> None:
        """Wait if anything else was due."""
        if run.step == run.total_steps or run.takes_long(run.step) or is_due(run, self._saved_every):
            wait_for_everyone()

    def on_end(self, run: Run) -> None:
        """Nothing: the end of a run waits itself."""
