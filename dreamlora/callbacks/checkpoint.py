"""When checkpoints are written."""

from __future__ import annotations

from dreamlora.interfaces import StepResult
from dreamlora.interrupts import deferred, heed
from dreamlora.training import state
from dreamlora.training.loop import Run, check_state, is_due


class CheckpointCallback:
    """Every ``every`` steps and at the end; and when a signal ends the run, also where none are wanted.

    Comes last, so that all else of the step is already on disk.

    Args:
        every: steps between two checkpoints; 0: none.
    """

    def __init__(self, every: int) -> None:
        self._every = every

    def on_start(self, run: Run) -> None:
        """Be ready for a signal; no checkpoint: step 0 is the base model."""
        run.keep = lambda: self._keep(run)
        self._look_ahead(run)

    def on_step(self, run: Run, result: StepResult) -> None:
        """Save if it is time.

        Raises:
            DivergedError: what would be saved is not finite.
        """
        with deferred():
            if is_due(run, self._every):
                self._save(run)
            self._look_ahead(run)
        heed()

    def on_end(self, run: Run) -> None:
        """Nothing: the last step saved."""

    def _look_ahead(self, run: Run) -> None:
        """Before a step on which long work follows, keep what a signal in the middle of that falls back to."""
        ahead = run.step < run.total_steps and run.takes_long(run.step + 1) and run.accelerator.is_main_process
        run.fallback = state.taken(run) if ahead else None

    def _keep(self, run: Run) -> None:
        """For the end by a signal: save the last step on which all has followed; none if that is half gone."""
        with deferred():
            if run.fallback is not None and (run.amid or run.step > run.fallback[0]):
                state.put_back(run, run.fallback)
            elif run.amid:
                return
            if run.step and run.step not in run.folder.checkpoint_steps():
                self._save(run)

    def _save(self, run: Run) -> None:
        check_state(run)
        if run.accelerator.is_main_process:
            state.save(run)
            state.rotate(run.folder, run.config.train.checkpoints_total_limit)
