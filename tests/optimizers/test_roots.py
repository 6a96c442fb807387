"""Matrix roots and geometric means: closed forms, defining equations, and where they give up."""

from __future__ import annotations

import pytest
import torch

from dreamlora.optimizers._roots import (
    FLOOR,
    damped_condition,
    geometric_mean,
    inverse_root,
    polar_factor,
    quintic_steps,
    spd_roots,
)


def spd(b: int, r: int, smallest: float = 0.1, seed: int = 0) -> torch.Tensor:
    """Eigenvalues from 1 down to ``smallest``."""
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(b, r, r, generator=generator, dtype=torch.float64)).Q
    return Q @ torch.diag(torch.logspace(0, torch.tensor(smallest).log10().item(), r, dtype=torch.float64)) @ Q.mT


@pytest.mark.parametrize(("smallest", "condition"), [(0.1, 100.0), (1e-5, 1e6), (1e-3, float("inf"))])
def test_roots_multiply_to_the_matrix_and_to_the_identity(smallest, condition):
    M = spd(3, 5, smallest)
    root, inverse_root, failed = spd_roots(M, condition)
    torch.testing.assert_close(root @ root, M, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        inverse_root @ M @ inverse_root, torch.eye(5).double().expand(3, 5, 5), atol=1e-9, rtol=0
    )
    assert torch.equal(root, root.mT) and not failed.any()


def test_float32_roots_of_a_damped_gram_matrix():
    K = spd(4, 16, 1e-7)
    M = K * 16 / K.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None] + 0.1 * torch.eye(16)
    found = spd_roots(M.float(), damped_condition(16, 0.1)).inverse_root
    torch.testing.assert_close(found.double(), spd_roots(M, float("inf")).inverse_root, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bad", [torch.zeros(3, 3), torch.full((3, 3), float("nan"))])
@pytest.mark.parametrize("condition", [100.0, float("inf")])
def test_what_has_no_root_becomes_the_identity_and_is_told(bad, condition):
    good = spd(1, 3)[0].float()
    root, inverse_root, failed = spd_roots(torch.stack([bad, good]), condition)
    assert failed.tolist() == [True, False]
    torch.testing.assert_close(root[0], torch.eye(3))
    torch.testing.assert_close(inverse_root[0], torch.eye(3))
    torch.testing.assert_close(root[1] @ root[1], good)


@pytest.mark.parametrize("condition", [100.0, float("inf")])
def test_the_geometric_mean_turns_one_gram_matrix_into_the_other(condition):
    KA, KB = spd(2, 4, seed=1), 3.0 * spd(2, 4, seed=2)
    S, S_inverse, failed = geometric_mean(KA, KB, condition)
    torch.testing.assert_close(S @ KA @ S, KB, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(S @ S_inverse, torch.eye(4).double().expand(2, 4, 4), rtol=0, atol=1e-9)
    assert not failed.any()


def test_refactoring_by_the_geometric_mean_balances_and_keeps_the_product():
    generator = torch.Generator().manual_seed(0)
    A, B = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 7), (5, 3)))
    S, S_inverse, _ = geometric_mean((A @ A.T)[None], (B.T @ B)[None], float("inf"))
    P = torch.linalg.cholesky(S[0])  # S = P Pᵀ
    balanced_A, balanced_B = P.T @ A, B @ torch.linalg.inv(P).T
    torch.testing.assert_close(balanced_A @ balanced_A.T, balanced_B.T @ balanced_B)
    torch.testing.assert_close(balanced_B @ balanced_A, B @ A)
    torch.testing.assert_close(S_inverse[0], torch.linalg.inv(S[0]))


# ---------------------------------------------------------------- inverse roots of second moments


def with_eps(V: torch.Tensor, eps: float) -> torch.Tensor:
    e, Q = torch.linalg.eigh(V)
    return Q @ torch.diag_embed(1 / (e.clamp(min=0).sqrt() + eps)) @ Q.mT


@pytest.mark.parametrize("eps", [0.0, 1e-3, 10.0])
@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e6])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 4e-3)])
def test_an_inverse_root_is_that_of_the_eigenvalues(eps, scale, dtype, tolerance):
    V = scale * spd(5, 6)
    found, failed = inverse_root(V, eps, dtype)
    wanted = with_eps(V, eps)
    torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance * float(wanted.abs().max()))
    assert not failed.any()


@pytest.mark.parametrize(("dtype", "floor"), [(torch.float64, 1e-6), (torch.float32, FLOOR)])
def test_directions_below_the_floor_are_passed_weaker_and_never_enlarged(dtype, floor):
    """A direction of length σ becomes ``σ⁵/(σ² + floor²)^(5/2)``: 1 above the floor, nothing below it."""
    Q = torch.linalg.qr(spd(1, 5)).Q
    sigma = torch.tensor([1.0, 30 * floor, floor, 0.1 * floor, 0.0], dtype=torch.float64)
    V = Q @ torch.diag(sigma**2) @ Q.mT
    found, failed = inverse_root(V, 0.0, dtype)
    lengths = sigma * (Q.mT @ found.double() @ Q).diagonal(dim1=-2, dim2=-1)[0]
    wanted = sigma**5 / (sigma**2 + floor**2) ** 2.5
    torch.testing.assert_close(lengths, wanted, rtol=0.2 if dtype == torch.float32 else 1e-2, atol=1e-3)
    torch.testing.assert_close(lengths[:2], wanted[:2], rtol=5e-3, atol=0)
    assert lengths.max() < 1.001 and not failed.any()


@pytest.mark.parametrize("directions", [1, 4])
def test_a_float32_gram_matrix_of_few_directions_has_a_root(directions):
    """Rounding makes its other eigenvalues negative as often as not; the one direction is just as long as the trace."""
    generator = torch.Generator().manual_seed(0)
    Z = torch.randn(50, 64, directions, generator=generator) @ torch.randn(50, directions, 640, generator=generator)
    found, failed = inverse_root(Z @ Z.mT, 0.0, torch.float32)
    lengths = torch.linalg.svdvals(found @ Z)
    assert not failed.any() and lengths.max() < 1.001
    assert lengths[:, :directions].min() > 0.99 and lengths[:, directions:].max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_inverse_root_of_zero_and_of_what_is_not_finite(dtype):
    V = torch.stack([torch.zeros(3, 3), torch.full((3, 3), float("nan")), torch.eye(3)]).to(dtype)
    found, failed = inverse_root(V, 0.0, dtype)
    assert failed.tolist() == [False, True, False]
    assert found[:2].abs().max() == 0
    torch.testing.assert_close(found[2], torch.eye(3, dtype=dtype), rtol=4e-3, atol=1e-6)


def test_a_polar_factor_is_that_of_the_singular_vectors():
    X = torch.randn(4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(X)
    X = U @ torch.diag_embed(S / S[:, :1]) @ Vh
    torch.testing.assert_close(polar_factor(X, 1e-7), U @ Vh, rtol=0, atol=1e-11)


@pytest.mark.parametrize("low", [1e-6, 1e-3, 0.1, 0.6, 0.95])
def test_each_quintic_is_the_closest_to_one(low):
    """No other odd quintic is: its error is as large at four points in turn (Chebyshev). And no other is tried."""
    a, b, c = quintic_steps(low, 0.5 * (1 - low))[0]
    x = torch.linspace(low, 1, 400_001, dtype=torch.float64)
    x = torch.cat([x, torch.logspace(torch.tensor(low).log10().item(), 0, 100_001, dtype=torch.float64)]).sort().values
    margin = 1.001 if low < 0.5 else 1.0  # in which the first ones leave room behind 1
    x = x * margin
    p = x * (a + b * x**2 + c * x**4)
    middle = (p.max() + p.min()) / 2
    error = p / middle - 1
    largest = error.abs().max()
    peaks = error[(error.abs() > largest * (1 - 1e-4))].sign()
    assert peaks[peaks.diff(prepend=peaks[:1] * 0) != 0].tolist() == [-1, 1, -1, 1]
    assert p.max() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(
    ("floor", "precision", "number"),
    [(1e-3, 3e-3, 6), (1e-2, 3e-3, 5), (1e-4, 3e-3, 8), (1e-3, 1e-7, 7), (1e-6, 1e-15, 13)],
)
def test_quintic_steps_bring_everything_above_the_floor_to_one(floor, precision, number):
    steps = quintic_steps(floor, precision)
    x = torch.logspace(torch.tensor(floor / 100).log10().item(), 0, 10_001, dtype=torch.float64)
    y = x.clone()
    for a, b, c in steps:
        y = y * (a + b * y**2 + c * y**4)
    assert len(steps) == number
    assert y[x >= floor].min() >= 1 - precision - 1e-12 and y.max() <= 1 + 1e-12 and y.min() > 0
