"""When checkpoints are written."""

from __future__ import annotations

from dreamlora.interfaces import StepResult
from dreamlora.training import state
from dreamlora.training.loop import Run, check_state


class CheckpointCallback:
    """Every ``--checkpointing_steps`` and at the end. Comes last, so that all else of the step is already on disk."""

    def on_start(self, run: Run) -> None:
        """Nothing: step 0 is the base model."""

    def on_step(self, run: Run, result: StepResult) -> None:
        """Save if it is time.

        Raises:
            DivergedError: what would be saved is not finite.
        """
        every = run.config.train.checkpointing_steps
        if every and (run.step % every == 0 or run.step == run.total_steps):
            self._save(run)

    def on_end(self, run: Run) -> None:
        """Nothing: the last step saved."""

    def _save(self, run: Run) -> None:
        check_state(run)
        if run.accelerator.is_main_process:
            state.save(run)
            state.rotate(run.folder, run.config.train.checkpoints_total_limit)
