"""Densities of times against their closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dreamlora.objectives.densities import Density, LogitNormal, beta, table

UNIFORMS = (torch.arange(2000) + 0.5) / 2000


def sigmas(density: Density) -> np.ndarray:
    """Ascending ones, as uniform numbers give them."""
    return np.sort(1 - density.places(UNIFORMS).numpy())


@pytest.mark.parametrize(
    ("a", "b", "below"),
    [
        (1.0, 1.0, lambda x: x),
        (2.0, 2.0, lambda x: 3 * x**2 - 2 * x**3),
        (3.0, 1.0, lambda x: x**3),
        (1.0, 4.0, lambda x: 1 - (1 - x) ** 4),
        (0.5, 0.5, lambda x: 2 / math.pi * np.arcsin(np.sqrt(x))),
        (0.1, 1.0, lambda x: x**0.1),
        (2.0, 5.0, lambda x: 1 - (1 - x) ** 5 * (1 + 5 * x)),
        (30.0, 1.0, lambda x: x**30),
    ],
)
def test_the_beta_distribution_of_sigma(a, b, below) -> None:
    """Its distribution function at the times of uniform numbers is these numbers."""
    drawn = sigmas(beta(a, b))
    counted = drawn > 1e-9  # 1 - σ rounds what is smaller
    np.testing.assert_allclose(below(drawn[counted]), UNIFORMS.numpy()[counted], atol=2e-5)
    assert counted.mean() > 0.8


@given(a=st.floats(0.05, 100), b=st.floats(0.05, 100))
def test_every_beta_has_its_mean(a: float, b: float) -> None:
    drawn = sigmas(beta(a, b))
    assert np.isfinite(drawn).all() and drawn.min() >= 0 and drawn.max() <= 1
    assert drawn.mean() == pytest.approx(a / (a + b), abs=1e-3)
    assert sigmas(beta(b, a)).mean() == pytest.approx(b / (a + b), abs=1e-3)


@given(shares=st.lists(st.floats(0, 10), min_size=2, max_size=20).filter(lambda shares: sum(shares) > 0.1))
def test_a_table_gives_its_parts_their_shares(shares: list[float]) -> None:
    counts, _ = np.histogram(sigmas(table(shares)), np.linspace(0, 1, len(shares) + 1))
    np.testing.assert_allclose(counts / len(UNIFORMS), np.array(shares) / sum(shares), atol=2e-3)


def test_inside_a_part_of_a_table_all_times_are_alike() -> None:
    drawn = sigmas(table([3, 0, 1]))
    np.testing.assert_allclose(np.quantile(drawn, [0.375, 0.6, 0.875]), [1 / 6, 0.8 / 3, 5 / 6], atol=1e-3)


def test_much_noise_comes_first() -> None:
    """As with the other densities, so that the same seed gives like times."""
    for density in (beta(2, 2), table([1, 2]), LogitNormal()):
        first, last = density.places(torch.tensor([0.1, 0.9]))
        assert first < last, "places count from noise"


def test_a_sigmoid_of_a_normal() -> None:
    """Its median, and that a standard deviation away."""
    normal = torch.distributions.Normal(0.0, 1.0).cdf(torch.tensor([0.0, 1.0, -1.0]))
    found = LogitNormal(0.4, 0.5).places(normal)
    expected = [1 / (1 + math.exp(-x)) for x in (0.4, 0.9, -0.1)]
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
