"""Matrix roots and geometric means: closed forms, defining equations, and where they give up."""

from __future__ import annotations

import pytest
import torch

from dreamlora.optimizers._roots import damped_condition, geometric_mean, spd_roots


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
