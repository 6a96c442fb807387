"""The Fréchet distance against closed forms and a matrix root written here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dreamlora.metrics.cmmd import cmmd
from dreamlora.metrics.fid import SELECTS, frechet
from dreamlora.metrics.kid import kid

Rows = Callable[..., Tensor]


def root(matrix: Tensor) -> Tensor:
    """The root of a symmetric positive semi-definite matrix, by its eigenvectors."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ values.clamp_min(0).sqrt().diag() @ vectors.T


def literal(x: Tensor, y: Tensor) -> float:
    """The textbook formula: tr((Σ₁ Σ₂)^½) = tr((Σ₁^½ Σ₂ Σ₁^½)^½)."""
    first, second = (rows.double().T.cov() for rows in (x, y))
    half = root(first)
    apart = (x.double().mean(0) - y.double().mean(0)).square().sum()
    return float(apart + first.trace() + second.trace() - 2 * root(half @ second @ half).trace())


@pytest.mark.filterwarnings("ignore:fd of")
@pytest.mark.parametrize(("n", "m", "d"), [(50, 70, 6), (4, 70, 6), (5, 3, 6), (2, 2, 6), (6, 7, 6)])
def test_it_is_the_textbook_formula(rows: Rows, n: int, m: int, d: int) -> None:
    x, y = rows(n, d, 1), 1.3 * rows(m, d, 2) + 0.2
    assert frechet(x, y) == pytest.approx(literal(x, y), rel=1e-5, abs=1e-6)


@pytest.mark.filterwarnings("ignore:fd of")
def test_closed_form_of_gaussians() -> None:
    """Samples whitened and coloured, so that mean and covariance are exact: |Δμ|² + Σ (σ₁ - σ₂)²."""
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(40, 5, generator=generator, dtype=torch.float64)
    white = white - white.mean(0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(white.T.cov()).T)
    s1, s2 = torch.tensor([1.0, 2, 3, 0.5, 4]).double(), torch.tensor([2.0, 2, 1, 0.1, 5]).double()
    mean = torch.tensor([1.0, 0, -2, 0, 0.5]).double()
    expected = float(mean.square().sum() + (s1 - s2).square().sum())
    assert frechet(white * s1, white * s2 + mean) == pytest.approx(expected, rel=1e-9)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64)).Q
    assert frechet(white * s1 @ turn, (white * s2 + mean) @ turn) == pytest.approx(expected, rel=1e-9)


@pytest.mark.filterwarnings("ignore:fd of")
def test_equal_sets_are_at_distance_zero(rows: Rows) -> None:
    for n in (3, 30):
        assert frechet(rows(n), rows(n)) == pytest.approx(0, abs=1e-10)


def test_small_sets_are_warned_of_and_single_images_refused(rows: Rows) -> None:
    with pytest.warns(UserWarning, match="fd of 5 and 40 images in 6 dimensions is rank-deficient: biased upward"):
        frechet(rows(5), rows(40))
    with pytest.warns(UserWarning, match="2,000 on each side are needed"):
        frechet(rows(10), rows(40))
    with pytest.raises(ValueError, match=r"fd needs at least 2 images on each side \(got 1 and 40\)"):
        frechet(rows(1), rows(40))


def test_it_never_selects() -> None:
    assert not SELECTS


@pytest.mark.filterwarnings("ignore:fd of")
@pytest.mark.parametrize("distance", [frechet, kid, cmmd])
def test_odd_rows_are_taken_or_refused(rows: Rows, distance: Callable[..., object]) -> None:
    distance(rows(8).bfloat16().requires_grad_(), rows(8, 6, 2).half())
    broken = rows(8).clone()
    broken[3, 2] = torch.nan
    with pytest.raises(ValueError, match=r"row 3 is (zero or )?not finite"):
        distance(rows(8), broken)
