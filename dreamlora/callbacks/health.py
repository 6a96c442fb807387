"""When the LoRA's health is measured, and under which names it is logged."""

from __future__ import annotations

from typing import Any

from dreamlora.interfaces import StepResult
from dreamlora.lora.health import Layer, layers_of, measure, update_rms
from dreamlora.metric_names import BALANCE, DW_NORM, STABLE_RANK, UPDATE_RMS, of_part
from dreamlora.training.loop import Run


class HealthCallback:
    """Measures at step 0, every ``every`` steps and at the end.

    Names: ``lora/dw_norm``, ``lora/stable_rank``, ``lora/balance`` and, of the step just made, ``opt/update_rms``; with
    ``/<group>`` behind them for parts of the model.

    Args:
        every: steps between measurements.
    """

    def __init__(self, every: int) -> None:
        self._every = every
        self._before: list[Layer] | None = None

    def on_start(self, run: Run) -> None:
        """Measure the start; after a resume that was done."""
        if run.accelerator.is_main_process:
            if run.step == 0:
                self._log(run, layers_of(_modules(run)))
            self._keep_if_next_is_due(run)

    def on_step(self, run: Run, result: StepResult) -> None:
        """Measure if it is time."""
        if run.accelerator.is_main_process:
            if self._due(run, run.step):
                self._log(run, layers_of(_modules(run)))
            self._keep_if_next_is_due(run)

    def on_end(self, run: Run) -> None:
        """Nothing: the last step measured."""

    def _due(self, run: Run, step: int) -> bool:
        return step % self._every == 0 or step == run.total_steps

    def _keep_if_next_is_due(self, run: Run) -> None:
        """The weights before the step whose update is measured."""
        self._before = layers_of(_modules(run)) if self._due(run, run.step + 1) else None

    def _log(self, run: Run, layers: list[Layer]) -> None:
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
