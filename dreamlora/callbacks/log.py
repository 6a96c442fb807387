"""Progress bar, metrics.jsonl and trackers."""

from __future__ import annotations

from tqdm.auto import tqdm

from dreamlora.interfaces import StepResult
from dreamlora.metric_names import GRAD_NORM, LEARNING_RATE, OPTIMIZER, SKIPPED, STEPS_PER_SECOND, TRAIN_LOSS
from dreamlora.training.loop import Run, is_due
from dreamlora.training.state import counts

COUNTED_EVERY = 50
"""Steps between two looks at the optimizer's counters: they lie on the GPU, and each look waits for it."""


class LogCallback:
    """Shows and stores every step's loss, gradient norm, learning rate and speed.

    What the optimizer counts (clipped, skipped, ...) is stored every ``COUNTED_EVERY`` steps and at the end, as the
    number since the last time; what came since then is part of checkpoints.
    """

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_start(self, run: Run) -> None:
        """Show the bar, also after a resume, where the run left off."""
        main = run.accelerator.is_main_process
        self._bar = tqdm(total=run.total_steps, initial=run.step, desc="training", unit="step", disable=not main)

    def on_step(self, run: Run, result: StepResult) -> None:
        """One row per value."""
        if not run.accelerator.is_main_process or self._bar is None:
            return
        values = {
            TRAIN_LOSS: result.loss,
            LEARNING_RATE: result.learning_rate,
            STEPS_PER_SECOND: 1 / result.seconds,
        }
        values |= {SKIPPED: 1.0} if result.skipped else {GRAD_NORM: result.grad_norm}
        if is_due(run, COUNTED_EVERY):
            values |= self._counts_since(run)
        run.folder.log_all(result.step, values)
        run.accelerator.log(values, step=result.step)
        self._bar.set_postfix(loss=f"{result.loss:.4f}", refresh=False)
        self._bar.update()

    def on_end(self, run: Run) -> None:
        """The last counts, if an earlier end than planned left some; close the bar."""
        if self._bar is None:
            return
        if run.accelerator.is_main_process and (counts := self._counts_since(run)):
            run.folder.log_all(run.step, counts)
            run.accelerator.log(counts, step=run.step)
        self._bar.close()

    def _counts_since(self, run: Run) -> dict[str, float]:
        """What the optimizer has counted since the last call, if anything. Waits for the GPU."""
        before, run.counted = run.counted, counts(run)
        new = {f"{OPTIMIZER}{name}": float(n - before.get(name, 0)) for name, n in run.counted.items()}
        return {name: n for name, n in new.items() if n}
