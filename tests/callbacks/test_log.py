"""What the optimizer counts is logged now and then, and no count is lost or comes twice."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dreamlora.callbacks import log
from dreamlora.callbacks.log import LogCallback
from dreamlora.interfaces import StepResult
from dreamlora.runfolder import RunFolder
from dreamlora.training.state import counts


class Optimizer:
    """Counts two in every step, and how often it was asked."""

    def __init__(self) -> None:
        self.total = self.asked = 0

    @property
    def stats(self) -> dict[str, int]:
        self.asked += 1
        return {"clipped": self.total, "skipped": 0}


def run_of(folder: Path, total_steps: int, step: int = 0) -> Any:
    accelerator = SimpleNamespace(is_main_process=True, log=lambda values, step: None)
    return SimpleNamespace(
        accelerator=accelerator,
        folder=RunFolder(folder),
        counted={},
        optimizer=SimpleNamespace(optimizer=Optimizer()),
        total_steps=total_steps,
        step=step,
    )


def go(run: Any, until: int) -> LogCallback:
    callback = LogCallback()
    callback.on_start(run)
    while run.step < until:
        run.step += 1
        run.optimizer.optimizer.total += 2
        callback.on_step(run, StepResult(run.step, 1.0, 1.0, 1e-3, 0.1))
    return callback


def counted(run: Any) -> list[tuple[int, str, float]]:
    rows = run.folder.metrics()
    return [(row["step"], row["name"], row["value"]) for row in rows if row["name"].startswith("optimizer/")]


@pytest.fixture(autouse=True)
def every_four_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "COUNTED_EVERY", 4)


def test_counters_are_read_now_and_then_and_at_the_end(tmp_path: Path) -> None:
    run = run_of(tmp_path, total_steps=10)
    go(run, 10).on_end(run)
    assert counted(run) == [(step, "optimizer/clipped", n) for step, n in ((4, 8.0), (8, 8.0), (10, 4.0))]
    assert run.optimizer.optimizer.asked == 4  # and once to see that nothing is left


def test_an_end_that_nobody_expected_loses_no_count(tmp_path: Path) -> None:
    run = run_of(tmp_path, total_steps=10)
    go(run, 6).on_end(run)
    assert counted(run) == [(4, "optimizer/clipped", 8.0), (6, "optimizer/clipped", 4.0)]


def test_a_resumed_run_has_the_counts_of_the_uninterrupted_one(tmp_path: Path) -> None:
    whole = run_of(tmp_path / "whole", total_steps=10)
    resumed = run_of(tmp_path / "resumed", total_steps=10)
    for run in (whole, resumed):
        run.folder.path.mkdir()
    go(whole, 10)
    go(resumed, 6)
    uncounted = {
        name: n - resumed.counted.get(name, 0) for name, n in counts(resumed).items()
    }  # as a checkpoint has it
    go(resumed, 8)  # killed
    resumed.folder.forget_after(6)
    again = run_of(tmp_path / "resumed", total_steps=10, step=6)
    again.counted = {name: -n for name, n in uncounted.items()}
    go(again, 10)
    assert counted(again) == counted(whole)
    assert sum(n for _, _, n in counted(again)) == 20
