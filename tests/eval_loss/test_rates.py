"""The rule of the range test on made-up curves: where it looks, what it takes, and what it says."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from dreamlora.eval_loss import rates
from dreamlora.eval_loss.rates import RangeTest, next_power, steps_of, vertex

ITEMS = np.linspace(0.3, 0.7, 32)


def search(curve: Callable[[float], float], own: float = 1e-4, steps: int = 12, total: float = 12) -> RangeTest:
    """The test of a run whose short runs end with the loss ``curve(rate)``; None stands for one that breaks off."""
    items: dict[int, np.ndarray | None] = {}
    tested = RangeTest(own, steps, total, ITEMS, items)
    while (power := next_power(tested.losses)) is not None:
        assert power not in items, "no rate is tried twice"
        loss = curve(tested.rate(power))
        items[power] = ITEMS * (loss / ITEMS.mean()) if math.isfinite(loss) else None
    return tested


def bowl(best: float) -> Callable[[float], float]:
    return lambda rate: 0.4 + 0.01 * math.log2(rate / best) ** 2


@pytest.mark.parametrize("best", [1e-6, 3e-5, 1e-4, 2.3e-4, 7e-4, 2e-3, 0.05])
def test_the_lowest_of_a_smooth_curve_is_found_wherever_it_lies(best: float) -> None:
    tested = search(bowl(best))
    assert tested.proposal() == pytest.approx(best, rel=0.01)
    assert len(tested.items) <= rates.MOST and not tested.edge
    lowest = rates.lowest(tested.losses)
    assert {lowest - 1, lowest + 1} <= tested.items.keys(), "rates a factor of two to both sides"


def test_a_rate_that_is_right_already_takes_the_usual_number_of_runs() -> None:
    assert len(search(bowl(1e-4)).items) == rates.USUAL


def test_rates_that_break_are_walls_and_the_best_lies_below_them() -> None:
    tested = search(lambda rate: 0.5 - 0.02 * math.log2(rate / 1e-5) if rate < 1.1e-3 else math.inf)
    assert 7e-4 < tested.proposal() < 1.1e-3
    assert tested.losses[max(tested.items)] == math.inf
    assert "diverged" in tested.reason("eval/loss")


def test_losses_that_are_not_finite_are_never_the_lowest() -> None:
    losses = {0: 0.5, 1: math.nan, 2: math.inf, -2: 0.6, -1: 0.55}
    assert rates.lowest(losses) == 0
    assert vertex(losses) == 0, "no parabola goes through infinity"
    assert rates.lowest({0: math.inf, 2: math.nan}) == 0


def test_where_all_break_the_search_goes_down_and_ends() -> None:
    tested = search(lambda rate: math.inf)
    assert len(tested.items) == rates.MOST and min(tested.items) < -rates.MOST
    assert tested.proposal() == 1e-4 and "cannot tell" in tested.reason("eval/loss")


def test_a_flat_curve_says_nothing() -> None:
    rng = np.random.default_rng(0)
    items = {power: ITEMS + rng.normal(0, 0.01, 32) for power in (-2, -1, 0, 1, 2)}
    tested = RangeTest(1e-4, 12, 1200, ITEMS + rng.normal(0, 0.01, 32), items)
    assert tested.proposal() == 1e-4
    assert "so the run has 0.0001, which it would have without a test" in tested.reason("eval/loss")


@pytest.mark.parametrize("falls", [True, False])
def test_a_best_rate_at_the_end_of_the_search_is_said_to_be_one(falls: bool) -> None:
    tested = search(lambda rate: 0.4 * (rate ** (-1e-3 if falls else 1e-3)))
    assert len(tested.items) == rates.MOST
    assert tested.edge == ("highest" if falls else "lowest")
    assert f"the {tested.edge} rate that was tried: a better one may lie beyond" in tested.reason("eval/loss")


def test_a_longer_run_gets_a_lower_rate() -> None:
    same, longer = search(bowl(1e-3)), search(bowl(1e-3), total=96)
    assert same.proposal() == pytest.approx(1e-3, rel=0.01)
    assert longer.proposal() == pytest.approx(1e-3 / 8**rates.EXPONENT, rel=0.01) == pytest.approx(5e-4, rel=0.01)
    assert search(bowl(1e-3), total=5).proposal() == same.proposal(), "a warm-up that never ends raises nothing"
    assert "a run 8 times as long wants a rate 2 times lower" in longer.reason("eval/loss")


def test_the_search_begins_where_the_usual_rate_would_be_the_best() -> None:
    assert search(bowl(2e-4), total=96).rate(0) == 2e-4
    assert len(search(bowl(2e-4), total=96).items) == rates.USUAL


def test_a_test_takes_a_hundredth_of_a_long_run_and_enough_of_a_short_one() -> None:
    per_step, items = 8.0, rates.ITEMS
    for total in (20_000, 100_000):
        taken = rates.USUAL * (steps_of(per_step, total, items) * per_step + items)
        assert 0.008 < taken / (per_step * total) <= rates.SHARE
    assert steps_of(per_step, 500, items) == rates.LEAST_STEPS
    assert steps_of(per_step, 5, items) == 5, "no longer than the run itself"


def test_the_record_holds_numbers_that_json_knows() -> None:
    facts = search(lambda rate: math.inf if rate > 3e-4 else bowl(1e-4)(rate)).facts("eval/loss", "id")
    assert [row["value"] is None for row in facts["tried"]].count(True) >= 1
    assert facts["learning_rate"] and facts["reason"] and facts["start"] == pytest.approx(0.5)
    for row in facts["tried"]:
        assert all(value is None or math.isfinite(value) for value in row.values())
