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
        (linalg.normalised_inverse, [1 / (4 / 3 + 0.5), 1 / (2 / 3 + 0.5)]),
        (linalg.natural_inverse, [1 / (4 + 1.5), 1 / (2 + 1.5)]),
        (linalg.absolute_inverse, [1 / 4.5, 1 / 2.5]),
    ],
)
def test_closed_form_on_a_diagonal(inverse, expected):
    P, failed = inverse(torch.diag(torch.tensor([4.0, 2.0], dtype=torch.float64))[None], 0.5)
    torch.testing.assert_close(P[0], torch.diag(torch.tensor(expected, dtype=torch.float64)))
    assert not failed.any()


@pytest.mark.parametrize(("inverse", "power"), [(linalg.normalised_inverse, 0), (linalg.natural_inverse, -1)])
def test_what_a_scaled_gram_does(inverse, power):
    K = spd(3, 4)
    torch.testing.assert_close(inverse(7.0 * K, 0.1).P, 7.0**power * inverse(K, 0.1).P)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_spd_inverse_is_the_inverse(dtype):
    M = spd(5, 6, dtype=dtype)
    torch.testing.assert_close(linalg.spd_inverse(M).P, torch.linalg.inv(M), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("inverse", [linalg.normalised_inverse, linalg.natural_inverse])
def test_zero_gram_gives_the_identity_and_counts_as_no_failure(inverse):
    K = torch.stack([torch.zeros(3, 3), torch.eye(3)])
    P, failed = inverse(K, 0.1)
    assert torch.equal(P[0], torch.eye(3))
    assert not failed.any()


@pytest.mark.parametrize("bad", [-torch.eye(3), torch.full((3, 3), float("nan"))])
def test_an_item_that_fails_becomes_the_identity_and_leaves_the_others_alone(bad):
    good = spd(1, 3, dtype=torch.float32)[0]
    P, failed = linalg.spd_inverse(torch.stack([bad, good]))
    assert failed.tolist() == [True, False]
    assert torch.equal(P[0], torch.eye(3))
    torch.testing.assert_close(P[1], linalg.spd_inverse(good[None]).P[0])


def test_common_rank_inverse_keeps_order_and_equals_one_at_a_time():
    grams = [spd(2, 4, 1), spd(3, 2, 2), spd(1, 4, 3), spd(2, 2, 4)]
    inverses, failures = linalg.common_rank_inverse(grams, linalg.normalised_inverse, 0.1)
    assert [int(n) for n in failures] == [0, 0]  # one factorisation per rank
    for K, P in zip(grams, inverses, strict=True):
        torch.testing.assert_close(P, linalg.normalised_inverse(K, 0.1).P)
