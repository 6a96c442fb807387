"""Formulas on cases with a known answer: tabulated t values, parabolas, curves that reach their target or never do."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from dreamlora.compare import stats
from dreamlora.compare.stats import TInterval

# Tables of Student's t: p, degrees of freedom, quantile.
TABULATED = [
    (0.975, 1, 12.706204736174698),
    (0.975, 2, 4.302652729749462),
    (0.975, 4, 2.7764451051977934),
    (0.975, 9, 2.2621571628540993),
    (0.975, 30, 2.0422724563012373),
    (0.95, 5, 2.015048372669157),
    (0.995, 10, 3.169272672616866),
    (0.9995, 3, 12.923978636687485),
    (0.6, 7, 0.26316686050366),
    (0.975, 1000, 1.962339080817582),
]


@pytest.mark.parametrize(("p", "df", "expected"), TABULATED)
def test_t_quantiles_are_the_tabulated_ones(p: float, df: int, expected: float) -> None:
    assert stats.t_quantile(p, df) == pytest.approx(expected, rel=1e-8)
    assert stats.t_quantile(1 - p, df) == pytest.approx(-expected, rel=1e-8)


@pytest.mark.parametrize("p", [0.01, 0.3, 0.5, 0.77, 0.999])
def test_one_and_two_degrees_of_freedom_have_closed_forms(p: float) -> None:
    assert stats.t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-9, abs=1e-12)
    a = 2 * p - 1
    assert stats.t_quantile(p, 2) == pytest.approx(a * math.sqrt(2 / (1 - a * a)), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("p", "df"), [(0.0, 3), (1.0, 3), (0.5, 0)])
def test_impossible_quantiles_are_refused(p: float, df: int) -> None:
    with pytest.raises(ValueError, match="0 < p < 1"):
        stats.t_quantile(p, df)


def test_incomplete_beta_against_its_polynomial() -> None:
    """I_x(2, 3) = x^2 (6 - 8 x + 3 x^2), on both sides of where the continued fraction is mirrored."""
    for x in (0.0, 0.05, 0.4, 0.41, 0.9, 1.0):
        assert stats.incomplete_beta(x, 2, 3) == pytest.approx(x * x * (6 - 8 * x + 3 * x * x), abs=1e-14)


def test_interval_of_five_values_by_hand() -> None:
    found = stats.t_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    half = 2.7764451051977934 * math.sqrt(2.5) / math.sqrt(5)
    assert (found.mean, found.n) == (3.0, 5)
    assert (found.low, found.high) == (pytest.approx(3 - half), pytest.approx(3 + half))


@pytest.mark.parametrize("n", [0, 1, 2])
def test_below_three_seeds_there_is_no_interval(n: int) -> None:
    found = stats.t_interval([1.0] * n)
    assert math.isnan(found.low) and math.isnan(found.high) and found.n == n
    assert stats.verdict(found) == "insufficient seeds"


@pytest.mark.parametrize("n", [3, 5])
def test_the_interval_covers_the_truth_as_often_as_it_says(n: int) -> None:
    draws = np.random.default_rng(0).normal(7.0, 2.0, (2000, n))
    inside = [found.low <= 7.0 <= found.high for found in map(stats.t_interval, draws.tolist())]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)


def test_paired_delta_of_a_constant_ratio() -> None:
    base = [0.40, 0.45, 0.52]
    found = stats.paired_delta([1.03 * loss for loss in base], base)
    assert found.pct.mean == pytest.approx(3) and found.pct.low == pytest.approx(3)
    assert found.each == pytest.approx((3, 3, 3)) and found.wins == 0


def test_swapping_the_methods_swaps_the_sign_and_no_more() -> None:
    ours, theirs = [0.41, 0.44, 0.50, 0.46], [0.42, 0.43, 0.52, 0.49]
    there, back = stats.paired_delta(ours, theirs), stats.paired_delta(theirs, ours)
    assert (1 + there.pct.mean / 100) * (1 + back.pct.mean / 100) == pytest.approx(1)
    assert (1 + there.pct.low / 100) * (1 + back.pct.high / 100) == pytest.approx(1)
    assert (there.wins, back.wins) == (3, 1)


def test_pairing_removes_what_seeds_share() -> None:
    """Seeds that move both methods by 10 % do not hide a difference of 1 %."""
    shared = np.exp(np.random.default_rng(1).normal(0, 0.1, 5))
    own = np.exp(np.random.default_rng(2).normal(0, 0.002, 5))
    found = stats.paired_delta((0.99 * shared * own).tolist(), shared.tolist())
    assert stats.verdict(found.pct) == "better"
    assert stats.verdict(stats.paired_delta((0.99 * shared * own).tolist(), shared[::-1].tolist()).pct) != "better"


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (-2.0, -0.1, "better"),
        (0.1, 2.0, "worse"),
        (-0.9, 0.9, "equivalent"),
        (-1.0, 1.0, "equivalent"),
        (-0.9, 1.1, "inconclusive"),
        (-1.1, 0.9, "inconclusive"),
        (-0.2, -0.1, "better"),
        (0.0, 0.5, "equivalent"),
    ],
)
def test_verdicts(low: float, high: float, word: str) -> None:
    assert stats.verdict(TInterval((low + high) / 2, low, high, 5)) == word


def test_equal_methods_are_told_apart_in_one_of_twenty_cases() -> None:
    rng = np.random.default_rng(3)
    pairs = np.exp(rng.normal(np.log(0.45), 0.01, (2000, 2, 5)))
    words = [stats.verdict(stats.paired_delta(ours.tolist(), theirs.tolist()).pct) for ours, theirs in pairs]
    assert sum(word in ("better", "worse") for word in words) / len(words) == pytest.approx(0.05, abs=0.015)


@pytest.mark.parametrize(("noise", "least"), [(0.003, 1.0), (0.01, 0.95)])
def test_three_percent_are_found_with_five_seeds(noise: float, least: float) -> None:
    """``noise`` is the standard deviation of a pair's log ratio."""
    draws = np.random.default_rng(4).normal(math.log(1.03), noise, (300, 5))
    words = [stats.verdict(stats.paired_delta(np.exp(draw).tolist(), [1.0] * 5).pct) for draw in draws]
    assert sum(word == "worse" for word in words) / len(words) >= least


def test_target_is_interpolated_between_measurements() -> None:
    assert stats.steps_to_target([0, 100, 200], [1.0, 0.8, 0.4], 0.5) == pytest.approx(175)
    assert stats.steps_to_target([0, 100, 200], [1.0, 0.8, 0.4], 0.8) == 100
    assert stats.steps_to_target([0, 100], [0.3, 0.2], 0.5) == 0


def test_the_first_crossing_counts() -> None:
    assert stats.steps_to_target([0, 10, 20, 30], [1.0, 0.4, 0.9, 0.3], 0.7) == pytest.approx(5)


def test_a_target_that_is_never_reached_is_infinitely_far() -> None:
    assert stats.steps_to_target([0, 100, 200], [1.0, 0.8, 0.7], 0.5) == math.inf
    assert stats.steps_to_target([0, 100], [math.nan, math.nan], 0.5) == math.inf
    assert stats.steps_to_target([], [], 0.5) == math.inf
    assert stats.steps_to_target([0, 100], [math.nan, 0.4], 0.5) == 100


def test_log_auc() -> None:
    assert stats.log_auc([0.5, 0.25], 1.0) == pytest.approx(1.5 * math.log(0.5))
    assert stats.log_auc([0.5, math.nan], 1.0) == math.inf
    assert math.isnan(stats.log_auc([], 1.0))


def parabola(lrs: list[float], centre: float, bend: float) -> list[float]:
    return [0.4 * math.exp(bend * math.log10(lr / centre) ** 2) for lr in lrs]


@pytest.mark.parametrize("tolerance", [0.02, 0.1])
def test_basin_of_a_parabola(tolerance: float) -> None:
    """ln(loss) = bend * decades^2 stays within the tolerance over 2 sqrt(ln(1 + tolerance) / bend) decades."""
    lrs, bend = np.logspace(-5, -1, 401).tolist(), 0.2
    found = stats.lr_basin(lrs, parabola(lrs, 1e-3, bend), 0.4, tolerance)
    half = math.sqrt(math.log(1 + tolerance) / bend)
    assert found.decades == pytest.approx(2 * half, rel=1e-3)
    assert math.log10(found.low) == pytest.approx(-3 - half, abs=1e-3)
    assert not found.censored_low and not found.censored_high


def test_basin_ends_on_the_line_between_two_rates() -> None:
    found = stats.lr_basin([1e-4, 1e-3, 1e-2], [0.8, 0.4, 0.8], 0.4, math.sqrt(2) - 1)
    assert math.log10(found.low) == pytest.approx(-3.5) and math.log10(found.high) == pytest.approx(-2.5)


def test_basin_that_reaches_the_ends_is_censored() -> None:
    found = stats.lr_basin([1e-4, 1e-3, 1e-2], [0.41, 0.4, 0.41], 0.4, 0.05)
    assert (found.low, found.high, found.censored_low, found.censored_high) == (1e-4, 1e-2, True, True)
    assert found.decades == pytest.approx(2)


def test_basin_stops_at_a_diverged_rate() -> None:
    found = stats.lr_basin([1e-4, 1e-3, 1e-2], [0.5, 0.4, math.inf], 0.4, 0.3)
    assert (found.low, found.high) == (1e-4, 1e-3)
    assert found.censored_low and not found.censored_high


def test_basin_is_one_piece_and_refers_to_the_best_of_all() -> None:
    hole = [0.40, 0.9, 0.41]
    assert stats.lr_basin([1e-4, 1e-3, 1e-2], hole, 0.4, 0.05).high < 1e-3
    assert stats.lr_basin([1e-4, 1e-3], [0.5, 0.5], 0.4, 0.05).decades == 0
    for losses in itertools.product([math.inf], repeat=2):
        assert stats.lr_basin([1e-4, 1e-3], losses, 0.4, 0.05).decades == 0
