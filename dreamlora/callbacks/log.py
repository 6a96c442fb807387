"""Progress bar, metrics.jsonl and trackers."""

from __future__ import annotations

from tqdm.auto import tqdm

from dreamlora.interfaces import StepResult
from dreamlora.metric_names import GRAD_NORM, LEARNING_RATE, STEPS_PER_SECOND, TRAIN_LOSS
from dreamlora.training.loop import Run


class LogCallback:
    """Shows and stores every step's loss, gradient norm, learning rate and speed."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._counts: dict[str, int] = {}

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
        if result.grad_norm is not None:
            values[GRAD_NORM] = result.grad_norm
        values |= self._counted(run)
        run.folder.log_all(result.step, values)
        run.accelerator.log(values, step=result.step)
        self._bar.set_postfix(loss=f"{result.loss:.4f}", refresh=False)
        self._bar.update()

    def _counted(self, run: Run) -> dict[str, float]:
        """What the optimizer's counters (``stats``: clipped, skipped, ...) counted in this step, if anything."""
        before, self._counts = self._counts, dict(getattr(run.optimizer.optimizer, "stats", {}))
        new = {f"optimizer/{name}": float(n - before.get(name, 0)) for name, n in self._counts.items()}
        return {name: n for name, n in new.items() if n}

    def on_end(self, run: Run) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
