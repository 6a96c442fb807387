"""Closed forms and failure behaviour of the batched linear algebra."""

import pytest
import torch

from dreamlora import linalg


def spd(batch: int, r: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    X = torch.randn(batch, r, 2 * r, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return X @ X.mT


def test_grams_are_those_of_the_rows_of_A_and_the_columns_of_B():
    A = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]])
    assert linalg.gram_rows(A).tolist() == [[5.0, 2.0], [2.0, 2.0]]
    assert linalg.gram_columns(A.mT).tolist() == [[5.0, 2.0], [2.0, 2.0]]


@pytest.mark.parametrize(
    ("inverse", "expected"),
    [
        (linalg.natural_inverse, [1 / (4 + 1.5), 1 / (2 + 1.5)]),
        (linalg.absolute_inverse, [1 / 4.5, 1 / 2.5]),
    ],
)
def test_closed_form_on_a_diagonal(inverse, expected):
    P, failed = inverse(torch.diag(torch.tensor([4.0, 2.0], dtype=torch.float64))[None], 0.5)
    torch.testing.assert_close(P[0], torch.diag(torch.tensor(expected, dtype=torch.float64)))
    assert not failed.any()


def test_relative_divides_by_the_mean_eigenvalue_and_adds_a_share_of_it():
    M, tau = linalg.relative(torch.diag(torch.tensor([4.0, 2.0]))[None], 0.5)
    torch.testing.assert_close(M[0], torch.diag(torch.tensor([4 / 3 + 0.5, 2 / 3 + 0.5])))
    assert tau.tolist() == [[[3.0]]]


def test_what_a_scaled_gram_does():
    K = spd(3, 4)
    torch.testing.assert_close(linalg.natural_inverse(7.0 * K, 0.1).P, linalg.natural_inverse(K, 0.1).P / 7.0)
    torch.testing.assert_close(linalg.relative(7.0 * K, 0.1)[0], linalg.relative(K, 0.1)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spd_inverse_is_the_inverse(dtype):
    M = spd(5, 6, dtype=dtype)
    torch.testing.assert_close(linalg.spd_inverse(M).P, torch.linalg.inv(M), rtol=1e-3, atol=1e-4)


def test_zero_gram_gives_the_identity_and_counts_as_no_failure():
    K = torch.stack([torch.zeros(3, 3), torch.eye(3)])
    P, failed = linalg.natural_inverse(K, 0.1)
    assert torch.equal(P[0], torch.eye(3))
    assert not failed.any()


@pytest.mark.parametrize("bad", [-torch.eye(3), torch.full((3, 3), float("nan"))])
def test_an_item_that_fails_becomes_the_identity_and_leaves_the_others_alone(bad):
    good = spd(1, 3, dtype=torch.float32)[0]
    P, failed = linalg.spd_inverse(torch.stack([bad, good]))
    assert failed.tolist() == [True, False]
    assert torch.equal(P[0], torch.eye(3))
    torch.testing.assert_close(P[1], linalg.spd_inverse(good[None]).P[0])


def test_orthonormal_coordinates():
    B = torch.randn(3, 9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    B[1, :, 3] = B[1, :, 0]  # three directions only
    B[2] = 0
    K = B.mT @ B
    E, share, failed = linalg.orthonormal_coordinates(K, 1e-14)
    torch.testing.assert_close(share[0], (E @ K @ E.mT)[0])
    basis = B @ (torch.linalg.matrix_power(share, 4) @ E).mT
    torch.testing.assert_close(basis[0].mT @ basis[0], torch.eye(4, dtype=torch.float64))
    lengths = torch.linalg.svdvals(basis[1])
    torch.testing.assert_close(lengths[:3], torch.ones(3, dtype=torch.float64), rtol=1e-9, atol=0)
    assert lengths[3] < 1e-2 and basis[2].abs().max() == 0 and not failed.any()
    bad, _, failed = linalg.orthonormal_coordinates(torch.full((1, 2, 2), float("nan"), dtype=torch.float64), 1e-14)
    assert failed.all() and bad.abs().max() == 0
