"""KID and CMMD against the direct double sums, their bias, and the permutation test."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dreamlora.metrics import _mmd
from dreamlora.metrics.cmmd import cmmd
from dreamlora.metrics.kid import kid

Rows = Callable[..., Tensor]


def cubic(x: list[float], y: list[float]) -> float:
    return (sum(a * b for a, b in zip(x, y, strict=True)) / len(x) + 1) ** 3


def gaussian(x: list[float], y: list[float]) -> float:
    def unit(v: list[float]) -> list[float]:
        return [a / math.hypot(*v) for a in v]

    return math.exp(-sum((a - b) ** 2 for a, b in zip(unit(x), unit(y), strict=True)) / 200)


def direct(first: Tensor, second: Tensor, kernel: Callable[[list[float], list[float]], float]) -> float:
    """Mean over pairs of different images of each side, minus twice the mean across."""
    x, y = first.double().tolist(), second.double().tolist()
    inside = [sum(kernel(a, b) for a, b in itertools.permutations(side, 2)) for side in (x, y)]
    across = sum(kernel(a, b) for a in x for b in y)
    n, m = len(x), len(y)
    return inside[0] / (n * (n - 1)) + inside[1] / (m * (m - 1)) - 2 * across / (n * m)


@pytest.mark.parametrize(("n", "m"), [(7, 5), (2, 9), (6, 6)])
def test_they_are_the_direct_double_sums(rows: Rows, n: int, m: int) -> None:
    x, y = rows(n, 6, 1), rows(m, 6, 2) + 0.3
    assert kid(x, y).value == pytest.approx(direct(x, y, cubic), rel=1e-5)
    assert cmmd(x, y).value == pytest.approx(1000 * direct(x, y, gaussian), rel=1e-5, abs=1e-9)


def test_blocks_do_not_change_the_value(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = rows(7, 6, 1), rows(5, 6, 2)
    whole = kid(x, y)
    monkeypatch.setattr(_mmd, "BLOCK_BYTES", 8 * 12 * 5)
    parts = kid(x, y)
    assert parts.value == pytest.approx(whole.value, rel=1e-12)
    assert (parts.p, parts.p_closer) == (whole.p, whole.p_closer)


def test_p_counts_the_random_splits_by_hand(rows: Rows) -> None:
    """Every split of the pooled rows, valued by the direct sum: the test's p is near the exact one."""
    x, y = rows(4, 3, 1), rows(4, 3, 2) + 0.8
    pooled = torch.cat([x, y])
    splits = [list(chosen) for chosen in itertools.combinations(range(8), 4)]
    values = [direct(pooled[chosen], pooled[[i for i in range(8) if i not in chosen]], cubic) for chosen in splits]
    observed = direct(x, y, cubic)
    found = kid(x, y)
    assert found.p == pytest.approx(sum(v >= observed - 1e-9 for v in values) / len(values), abs=0.05)
    assert found.p_closer == pytest.approx(sum(v <= observed + 1e-9 for v in values) / len(values), abs=0.05)


def test_equal_distributions_give_zero_on_average_and_even_p(rows: Rows) -> None:
    found = [kid(rows(12, 3, seed), rows(10, 3, 1000 + seed), permutations=99) for seed in range(150)]
    values = torch.tensor([one.value for one in found])
    assert abs(float(values.mean())) < 3 * float(values.std()) / 150**0.5
    assert (values < 0).any(), "it is not cut off at zero"
    small = sum(one.p <= 0.1 for one in found)
    assert 5 <= small <= 27, f"{small} of 150 below 0.1"


def test_different_distributions_are_seen_and_copies_raise_the_alarm(rows: Rows) -> None:
    real = rows(30, 6, 1)
    apart = kid(rows(30, 6, 2) + 2, real)
    assert apart.value > 0 and apart.p <= 0.01 and not apart.memorised
    for metric in (kid, cmmd):
        copied = metric(real + 0.05 * rows(30, 6, 3), real)
        assert copied.value < 0 and copied.memorised and copied.p > 0.9
        assert not metric(rows(30, 6, 4), real).memorised


def test_the_observed_split_is_one_of_those_that_chance_could_give() -> None:
    """So p is never 0: with 19 random splits and sets that are as far apart as can be, it is 1/20."""
    found = kid(torch.zeros(12, 3), torch.ones(12, 3), permutations=19)
    assert (found.p, found.p_closer) == (1 / 20, 1.0)


def test_neither_order_nor_the_global_state_matters(rows: Rows) -> None:
    x, y = rows(9, 6, 1), rows(8, 6, 2)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found = kid(x, y)
    assert torch.equal(before, torch.get_rng_state())
    other = kid(x.flip(0), y.roll(3, 0))
    assert (found.p, found.p_closer) == (other.p, other.p_closer)
    assert other.value == pytest.approx(found.value, rel=1e-12)


@pytest.mark.parametrize("metric", [kid, cmmd])
def test_single_images_are_refused(metric: Callable[..., object], rows: Rows) -> None:
    with pytest.raises(ValueError, match=r"needs at least 2 images on each side \(got 1 and 40\)"):
        metric(rows(1), rows(40))
