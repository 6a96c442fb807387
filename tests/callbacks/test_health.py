"""Health in a run: at which steps, under which names, and that a killed run goes on with the same numbers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dreamlora.callbacks.health import HealthCallback
from dreamlora.lora.health import TOTAL, snapshots, update_rms
from tests.inits.problems import Problem, problem


class Log:
    """What a run folder and a tracker would get: rows and their steps."""

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, float]] = {}

    def log_all(self, step: int, values: dict[str, float]) -> None:
        self.rows[step] = values


def run_of(made: Problem, log: Log, step: int = 0, total: int = 5) -> Any:
    model = SimpleNamespace(denoiser=made.net, encoders={})
    accelerator = SimpleNamespace(is_main_process=True, unwrap_model=lambda _: model, log=lambda *_, **__: None)
    return SimpleNamespace(folder=log, accelerator=accelerator, model=None, step=step, total_steps=total)


def steps(callback: HealthCallback, run: Any, made: Problem, until: int) -> None:
    while run.step < until:
        for target in made.targets:
            target.B.data += (run.step + 1) * 0.01
        run.step += 1
        callback.on_step(run, None)


def test_steps_and_names() -> None:
    made, log = problem(), Log()
    run = run_of(made, log)
    callback = HealthCallback(2)
    callback.on_start(run)
    steps(callback, run, made, 5)
    assert list(log.rows) == [0, 2, 4, 5]
    groups = ["", "/conv", "/square", "/out"]
    assert set(log.rows[0]) == {f"lora/{name}{group}" for name in ("dw_norm", "balance") for group in groups}
    names = [*("lora/dw_norm", "lora/stable_rank", "lora/balance", "opt/update_rms")]
    assert set(log.rows[2]) == {f"{name}{group}" for name in names for group in groups}


def test_the_update_is_that_of_the_last_step_alone() -> None:
    made, log = problem(), Log()
    run = run_of(made, log)
    callback = HealthCallback(3)
    callback.on_start(run)
    steps(callback, run, made, 2)
    before = snapshots({"": made.net})
    steps(callback, run, made, 3)
    assert log.rows[3]["opt/update_rms"] == pytest.approx(update_rms(before, snapshots({"": made.net}))[TOTAL])


@pytest.mark.parametrize("stop", [1, 2, 4])
def test_after_a_resume_the_numbers_are_the_same(stop: int) -> None:
    made, log = problem(), Log()
    run, callback = run_of(made, log), HealthCallback(2)
    callback.on_start(run)
    steps(callback, run, made, stop)
    again, rest = problem(), Log()
    with torch.no_grad():
        for target, other in zip(made.targets, again.targets, strict=True):
            other.B.copy_(target.B)
            other.A.copy_(target.A)
    steps(callback, run, made, 5)
    resumed, fresh = run_of(again, rest, step=stop), HealthCallback(2)
    fresh.on_start(resumed)
    steps(fresh, resumed, again, 5)
    assert rest.rows == {step: values for step, values in log.rows.items() if step > stop}
