"""What summary.json says of the curves."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dreamlora.run import ending
from dreamlora.runfolder import RunFolder


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([0.5, 0.3, 0.4], (0.5, 0.4, 0.3, 1)),
        ([0.5, 0.3, math.nan], (0.5, None, 0.3, 1)),
        ([0.5, math.inf, 0.4], (0.5, 0.4, 0.4, 2)),
        ([math.nan, math.nan], (None, None, None, None)),
    ],
)
def test_losses_that_were_not_finite_are_none_and_never_the_best(
    losses: list[float], expected: tuple[float | None, ...], tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    for step, loss in enumerate(losses):
        folder.log_all(step, {"eval/loss": loss})
    assert tuple(ending._eval_rows(folder).values()) == expected
