"""The last word on a run: the larger evaluation set, on the base model, the best checkpoint and the last step."""

from __future__ import annotations

from dreamlora.callbacks.evaluate import measure
from dreamlora.callbacks.weights import base_model, candidate
from dreamlora.eval_loss.evalset import EvalSet
from dreamlora.eval_loss.items import ItemLosses
from dreamlora.interfaces import StepResult
from dreamlora.metric_names import FINAL_LOSS, GAP, relative
from dreamlora.processes import tell_everyone
from dreamlora.training.loop import Run


class FinalCallback:
    """Measures the base model at the start; at the end the last step, and the best one if that is another.

    Args:
        items: the larger set.
        learned: items of training images, for the gap; None if no images were held out.
    """

    def __init__(self, items: EvalSet, learned: EvalSet | None) -> None:
        self._items = items
        self._learned = learned
        self._losses: ItemLosses = items.losses()

    def on_start(self, run: Run) -> None:
        """Measure the base model, or take up its measurement in a resumed run.

        A run that is resumed to more steps, or with another number of items, has another set.
        """
        if run.accelerator.is_main_process:
            self._items.save(run.folder.final_evalset_file)
        if not tell_everyone(run.accelerator.is_main_process and self._is_known(run)):
            with base_model(run):
                self._measure(run, 0)

    def _is_known(self, run: Run) -> bool:
        """Whether the base model was measured on these items before this process began."""
        file = run.folder.final_items_file
        return run.step > 0 and file.exists() and self._losses.take_up(file, until=0) and 0 in self._losses

    def on_step(self, run: Run, result: StepResult) -> None:
        """Nothing: this is for the end."""

    def on_end(self, run: Run) -> None:
        """Measure the last step and the best one."""
        best = tell_everyone(run.folder.selection().get("step") if run.accelerator.is_main_process else None)
        if best not in (None, run.step):
            with candidate(run, best):
                self._measure(run, best)
        self._measure(run, run.step)

    def _measure(self, run: Run, step: int) -> None:
        measured = measure(run, self._items)
        learned = measure(run, self._learned) if self._learned else []
        if not run.accelerator.is_main_process:
            return
        self._losses.put(step, measured)
        self._losses.save(run.folder.final_items_file)
        values = {FINAL_LOSS: self._losses.mean(step)}
        if 0 in self._losses:
            values[relative(FINAL_LOSS)] = float((self._losses.rows[step] / self._losses.rows[0]).mean())
        if learned:
            values[GAP] = values[FINAL_LOSS] - sum(learned) / len(learned)
        more = {"at_end": True} if step else {}  # a resumed run measures these again
        run.folder.log_all(step, values, n=len(measured), evalset_id=self._items.id, **more)
        run.accelerator.log(values, step=step)
