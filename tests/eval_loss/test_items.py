"""Item losses: paired differences, and the file."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from dreamlora.eval_loss.items import ItemLosses, paired_difference


def test_the_difference_is_paired() -> None:
    """Against the textbook: mean and standard error of d = a - b, whatever the spread of a and b."""
    random = np.random.default_rng(0)
    level = random.lognormal(size=64)  # the times: nearly all of the spread
    apart = random.normal(0.01, 0.02, 64)
    found = paired_difference(level + apart, level)
    assert found.n == 64
    assert found.mean == pytest.approx(apart.mean(), rel=1e-9)
    assert found.se == pytest.approx(math.sqrt(((apart - apart.mean()) ** 2).sum() / 63 / 64), rel=1e-9)
    assert found.standard_errors == pytest.approx(found.mean / found.se)
    assert found.se < level.std() / 8 / 20


def test_differences_without_spread() -> None:
    items = np.array([1.0, 2.0])
    assert paired_difference(items, items).standard_errors == 0
    assert paired_difference(items, items + 0.5).standard_errors == -math.inf
    assert paired_difference(items[:1], items[:1] - 1) == paired_difference(np.array([3.0]), np.array([2.0]))


def test_the_file_holds_everything_and_a_resume_takes_up_its_part(tmp_path: Path) -> None:
    losses = ItemLosses("abcd", np.array([0, 0, 1]), np.array([0.1, 0.6, 0.3], dtype=np.float32))
    values = {0: [0.5, 0.25, 1 / 3], 50: [0.4, 0.2, 0.3], 100: [0.3, 0.1, 0.2]}
    for step, row in values.items():
        losses.put(step, row)
    losses.save(tmp_path / "items.npz")
    again = ItemLosses.load(tmp_path / "items.npz")
    assert (again.evalset_id, again.steps) == ("abcd", [0, 50, 100])
    assert all(np.array_equal(again.rows[step], losses.rows[step]) for step in values)
    assert again.take_up(tmp_path / "items.npz", until=50)
    assert again.steps == [0, 50] and 100 not in again
    assert again.mean(0) == losses.mean(0)
    assert {file.name for file in tmp_path.iterdir()} == {"items.npz"}
