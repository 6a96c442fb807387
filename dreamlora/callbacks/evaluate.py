"""When the deterministic evaluation loss is measured, where its values go, and when it ends the training."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from dreamlora.callbacks.weights import before_first_step
from dreamlora.eval_loss.evalset import EvalSet, Measured, evaluate_loss
from dreamlora.eval_loss.items import ItemLosses, values_of
from dreamlora.eval_loss.selection import difference_text, stalled
from dreamlora.interfaces import Conditioning, StepResult
from dreamlora.metric_names import name_of_step_0
from dreamlora.processes import tell_everyone
from dreamlora.training.loop import Run, is_due

logger = logging.getLogger(__name__)


class EvaluateCallback:
    """Measures at step 0, every ``every`` steps and at the end; ends the run early if it no longer gets better.

    Comes before those that draw and save, so that a step that turns out to be the last is the last for them too.

    Args:
        items: the frozen set.
        every: steps between measurements.
        name: of the metric: "eval/loss", or "eval/loss_train" where no image could be held out.
        patience: measurements without a clear improvement after which the run ends; None: never.

    Attributes:
        losses: of every item at every measured step; filled on the main process.
    """

    def __init__(self, items: EvalSet, every: int, name: str, patience: int | None = None) -> None:
        self.losses: ItemLosses = items.losses()
        self._items = items
        self._every = every
        self._name = name
        self._patience = patience

    def on_start(self, run: Run) -> None:
        """Measure what the run begins with, or take up a resumed run's measurements, if they are of these items."""
        file = run.folder.eval_items_file
        if run.accelerator.is_main_process:
            self._items.save(run.folder.evalset_file)
        # The main process decides: others may not see its disk.
        main = run.accelerator.is_main_process
        known = tell_everyone(main and run.step > 0 and file.exists() and self.losses.take_up(file, until=run.step))
        if run.step and not tell_everyone(0 in self.losses):
            with before_first_step(run):
                self._measure(run, 0)
        if not known:
            self._measure(run, run.step)
        self._stop_if_in_vain(run)

    def on_step(self, run: Run, result: StepResult) -> None:
        """Measure if it is time."""
        if is_due(run, self._every):
            self._measure(run, run.step)
            self._stop_if_in_vain(run)

    def on_end(self, run: Run) -> None:
        """Nothing: the last step measured."""

    def _measure(self, run: Run, step: int) -> None:
        measured = measure(run, self._items)
        if not run.accelerator.is_main_process:
            return
        self.losses.put(step, measured)
        self.losses.save(run.folder.eval_items_file)
        values = values_of(self.losses, step, self._name)
        run.folder.log_all(step, values, n=len(measured), evalset_id=self._items.id)
        if step == run.step:  # trackers take no step of the past
            run.accelerator.log(values, step=step)

    def _stop_if_in_vain(self, run: Run) -> None:
        if not self._patience or run.step >= run.total_steps:
            return
        reason = tell_everyone(self._reason_to_stop(run) if run.accelerator.is_main_process else None)
        if reason:
            run.end_here(reason)
            if run.accelerator.is_main_process:
                logger.warning(reason)

    def _reason_to_stop(self, run: Run) -> str | None:
        stall = stalled(self.losses, self._patience or 0)
        if stall is None:
            return None
        reference = f"that of step {stall.step}" if stall.step else f"the {name_of_step_0(run.config.lora.init_lora)}'s"
        now = f"{difference_text(stall.apart)} {'above' if stall.apart.mean > 0 else 'below'} it"
        return (
            f"Stopped early at step {run.step} of {run.total_steps}: {self._name} has not clearly fallen below "
            f"{reference} for {stall.waited} evaluations; it is {now}. To go on from here, give a larger "
            f"--early_stopping (now {self._patience}) and --resume_from_checkpoint latest."
        )


def measure(run: Run, items: EvalSet) -> list[float]:
    """The run's model on these items, the work shared by the processes; every process gets all losses."""
    accelerator = run.accelerator

    def conditioning(captions: Sequence[str], views: Conditioning) -> Conditioning:
        return {name: value.to(accelerator.device) for name, value in run.conditioning(captions, views).items()}

    started = time.perf_counter()
    run.model.eval()
    with run.memory.stage("evaluation loss"), accelerator.autocast():
        losses = evaluate_loss(
            Measured(run.predict, run.objective, conditioning, accelerator.device),
            items,
            batch_size=run.config.eval.eval_batch_size,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        )
    run.model.train()
    run.eval_seconds += time.perf_counter() - started
    return losses
