"""How the embeddings of new tokens fare, and when they train no longer."""

from __future__ import annotations

import torch

from dreamlora.interfaces import StepResult
from dreamlora.metric_names import TOKEN_CHANGE, TOKEN_NORM, of_part
from dreamlora.training.loop import Run, is_due


class NewTokensCallback:
    """Measures at step 0, every ``every`` steps and at the end; lets the embeddings be from a step on.

    Names: ``tokens/norm``, the mean length of the vectors, where 1 is that of the model's own embeddings; and
    ``tokens/change``, their mean distance from their start in the same unit; with ``/<text encoder>`` behind them, if
    there are several.

    Args:
        every: steps between measurements; 0: none.
        end: steps that the embeddings train for; None: all.
    """

    def __init__(self, every: int, end: float | None) -> None:
        self._every = every
        self._end = end

    def on_start(self, run: Run) -> None:
        """Measure the start; after a resume that was done."""
        self._end_here(run)
        if run.step == 0 and self._every:
            self._log(run)

    def on_step(self, run: Run, result: StepResult) -> None:
        """Measure if it is time."""
        self._end_here(run)
        if is_due(run, self._every):
            self._log(run)

    def on_end(self, run: Run) -> None:
        """Nothing: the last step measured."""

    def _end_here(self, run: Run) -> None:
        """What has no gradient is moved by no optimizer, and decayed by none."""
        if self._end is None or run.step < self._end:
            return
        for part in run.new_tokens.values():
            part.rows.requires_grad_(False)
            part.rows.grad = None

    def _log(self, run: Run) -> None:
        if not run.accelerator.is_main_process:
            return
        rows = {}
        for name, part in run.new_tokens.items():
            lengths = torch.stack([part.rows.detach().norm(dim=1), (part.rows.detach() - part.start).norm(dim=1)])
            rows[name] = (lengths / part.scale).cpu()
        groups = {"": torch.cat(list(rows.values()), dim=1), **(rows if len(rows) > 1 else {})}
        values = {
            of_part(name, group): float(value)
            for group, lengths in groups.items()
            for name, value in zip((TOKEN_NORM, TOKEN_CHANGE), lengths.mean(dim=1), strict=True)
        }
        run.folder.log_all(run.step, values)
        run.accelerator.log(values, step=run.step)
