"""Item losses: paired differences, and the file."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dreamlora.errors import UserError
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


DAMAGE = {
    "empty": lambda whole: b"",
    "cut": lambda whole: whole[:-40],
    "in the middle": lambda whole: whole[:300] + bytes(40) + whole[340:],
    "zeros": lambda whole: bytes(len(whole)),
    "no archive": lambda whole: b"losses",
    "another array": lambda whole: b"\x93NUMPY\x01\x00",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_named_and_left_out(
    damage: Callable[[bytes], bytes], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "eval_items.npz"
    losses = ItemLosses("id", np.array([0, 0, 1]), np.array([0.1, 0.5, 0.9]))
    losses.put(0, [1.0, 2.0, 3.0])
    losses.save(file)
    assert (found := ItemLosses.found(file)) is not None and found.steps == [0]
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=r"cannot read .*eval_items\.npz"):
        ItemLosses.load(file)
    assert ItemLosses.found(file) is None and not losses.take_up(file, until=5)
    assert len(caplog.messages) == 1 and "What it held is left out" in caplog.text
    assert ItemLosses.found(tmp_path / "none.npz") is None
