"""When the deterministic evaluation loss is measured, and where its values go."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object

from dreamlora.interfaces import Conditioning, StepResult
from dreamlora.metrics.eval_loss import EvalSet, Measured, evaluate_loss
from dreamlora.runfolder import replacing
from dreamlora.training.loop import Run

TIME_BINS = 8


class EvaluateCallback:
    """Measures at step 0, every ``every`` steps and at the end.

    Args:
        items: the frozen set.
        every: steps between measurements.
        name: of the metric: "eval/loss", or "eval/loss_train" where no image could be held out.
    """

    def __init__(self, items: EvalSet, every: int, name: str) -> None:
        self._items = items
        self._every = every
        self._name = name
        self._rows: dict[int, list[float]] = {}

    def on_start(self, run: Run) -> None:
        """Measure the base model, or take up the earlier measurements of a resumed run."""
        file = run.folder.eval_items_file
        # The main process decides: others may not see its disk.
        known = broadcast_object_list([bool(run.step and file.exists())])[0]
        if not known:
            self._measure(run)
        elif run.accelerator.is_main_process:
            with np.load(file) as saved:
                rows = zip(saved["steps"].tolist(), saved["items"].tolist(), strict=True)
                self._rows = {step: items for step, items in rows if step <= run.step}

    def on_step(self, run: Run, result: StepResult) -> None:
        """Measure if it is time."""
        if run.step % self._every == 0 or run.step == run.total_steps:
            self._measure(run)

    def on_end(self, run: Run) -> None:
        """Nothing: the last step measured."""

    def _measure(self, run: Run) -> None:
        losses = self._losses(run)
        if not run.accelerator.is_main_process:
            return
        self._rows[run.step] = losses
        with replacing(run.folder.eval_items_file) as temporary, temporary.open("wb") as file:
            np.savez(
                file,
                steps=np.array(list(self._rows)),
                items=np.array(list(self._rows.values()), dtype=np.float32),
                position=self._items.position.numpy(),
                image=self._items.image.numpy(),
                evalset_id=np.array(self._items.id),
            )
        values = self._values(np.array(losses))
        run.folder.log_all(run.step, values, n=len(losses), evalset_id=self._items.id)
        run.accelerator.log(values, step=run.step)

    def _losses(self, run: Run) -> list[float]:
        accelerator = run.accelerator

        def conditioning(captions: Sequence[str]) -> Conditioning:
            return {name: value.to(accelerator.device) for name, value in run.conditioning(captions).items()}

        run.model.eval()
        with accelerator.autocast():
            mine = evaluate_loss(
                Measured(run.predict, run.objective, conditioning, accelerator.device),
                self._items,
                batch_size=run.config.eval.eval_batch_size,
                rank=accelerator.process_index,
                world=accelerator.num_processes,
            )
        run.model.train()
        merged = dict(sorted(pair for part in gather_object([mine]) for pair in part.items()))
        return list(merged.values())

    def _values(self, losses: np.ndarray) -> dict[str, float]:
        values = {self._name: float(losses.mean())}
        base = np.array(next(iter(self._rows.values())))
        values[f"{self._name}_rel"] = float((losses / base).mean())
        bins = torch.clamp((self._items.position * TIME_BINS).long(), max=TIME_BINS - 1).numpy()
        for number in np.unique(bins):
            values[f"{self._name}_t/{number}"] = float(losses[bins == number].mean())
        return values
