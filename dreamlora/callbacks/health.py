"""When the LoRA's health is measured, and under which names it is logged."""

from __future__ import annotations

from typing import Any

from dreamlora.interfaces import StepResult
from dreamlora.lora.changes import Change
from dreamlora.lora.health import measure, snapshots, update_rms
from dreamlora.metric_names import BALANCE, DW_NORM, STABLE_RANK, UPDATE_RMS, of_part
from dreamlora.training.loop import Run, is_due


class HealthCallback:
    """Measures at step 0, every ``every`` steps and at the end.

    Names: ``lora/dw_norm``, ``lora/stable_rank``, ``lora/balance`` and, of the step just made, ``opt/update_rms``; with
    ``/<group>`` behind them for parts of the model.

    Args:
        every: steps between measurements.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._before: list[Change] | None = None

    def on_start(self, run: Run) -> None:
        """Measure the start; after a resume that was done."""
        self._look(run, run.step == 0)

    def on_step(self, run: Run, result: StepResult) -> None:
        """Measure if it is time."""
        self._look(run, is_due(run, self._every))

    def on_end(self, run: Run) -> None:
        """Nothing: the last step measured."""

    def _look(self, run: Run, now: bool) -> None:
        """Measure if that is to be ``now``, and keep the weights if the update of the next step is to be measured."""
        if not run.accelerator.is_main_process:
            return
        soon = is_due(run, self._every, run.step + 1)
        layers = snapshots(_modules(run)) if now or soon else []
        if now:
            self._log(run, layers)
        self._before = layers if soon else None

    def _log(self, run: Run, layers: list[Change]) -> None:
        values: dict[str, float | None] = {}
        for group, health in measure(layers).items():
            measured = {DW_NORM: health.dw_norm, STABLE_RANK: health.stable_rank, BALANCE: health.balance}
            values |= {of_part(name, group): value for name, value in measured.items()}
        for group, rms in (update_rms(self._before, layers) if self._before else {}).items():
            values[of_part(UPDATE_RMS, group)] = rms
        known = {name: value for name, value in values.items() if value is not None}
        run.folder.log_all(run.step, known)
        run.accelerator.log(known, step=run.step)


def _modules(run: Run) -> dict[str, Any]:
    """The denoiser by its blocks, and each text encoder as a whole."""
    model = run.accelerator.unwrap_model(run.model)
    return {"": model.denoiser, **dict(model.encoders.items())}
