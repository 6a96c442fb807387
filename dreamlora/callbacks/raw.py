"""Whether the moving average is better than the weights that it is of: these are measured beside it."""

from __future__ import annotations

from dreamlora.callbacks.evaluate import measure
from dreamlora.eval_loss.evalset import EvalSet
from dreamlora.eval_loss.items import ItemLosses
from dreamlora.interfaces import StepResult
from dreamlora.metric_names import raw
from dreamlora.processes import tell_everyone
from dreamlora.training.ema import MovingAverage
from dreamlora.training.loop import Run, is_due


class RawCallback:
    """Measures the weights without their average at every step at which the average is measured, but for step 0.

    Comes after the evaluation, which may make a step the last one.

    Args:
        average: of the run.
        items: the frozen set of the evaluation.
        every: steps between its measurements.
        name: of its metric.
    """

    def __init__(self, average: MovingAverage, items: EvalSet, every: int, name: str) -> None:
        self._average = average
        self._items = items
        self._every = every
        self._name = raw(name)
        self._losses: ItemLosses = items.losses()

    def on_start(self, run: Run) -> None:
        """After a resume, take up the earlier measurements if they are of these items; the start needs none."""
        file = run.folder.raw_items_file
        main = run.accelerator.is_main_process
        known = tell_everyone(main and run.step > 0 and file.exists() and self._losses.take_up(file, until=run.step))
        if run.step and not known:
            self._measure(run)

    def on_step(self, run: Run, result: StepResult) -> None:
        """Measure if it is time."""
        if is_due(run, self._every):
            self._measure(run)

    def on_end(self, run: Run) -> None:
        """Nothing: the last step measured."""

    def _measure(self, run: Run) -> None:
        with self._average.trained():
            measured = measure(run, self._items)
        if not run.accelerator.is_main_process:
            return
        self._losses.put(run.step, measured)
        self._losses.save(run.folder.raw_items_file)
        values = {self._name: self._losses.mean(run.step)}
        run.folder.log_all(run.step, values, n=len(measured), evalset_id=self._items.id)
        run.accelerator.log(values, step=run.step)
