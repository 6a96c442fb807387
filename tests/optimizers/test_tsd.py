"""LoRA-TSD against dense matrices (full gradients, projections, SVD), the size of its steps, what it does not see."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dreamlora.optimizers import LoRATSD
from dreamlora.optimizers._tangent import flattened
from tests.optimizers.lora_problems import (
    cast,
    descend,
    general,
    make_pairs,
    pair_group,
    quadratic_gradients,
    regauge,
    relative_distance,
    targets,
    values,
)


def msign(Z: Tensor) -> Tensor:
    """``U Vᵀ`` of the singular vectors that belong to more than rounding."""
    U, S, Vh = torch.linalg.svd(Z, full_matrices=False)
    return U[:, 1e-10 * S[0] < S] @ Vh[1e-10 * S[0] < S]


def projected(Z: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """``P_B Z + Z P_A − P_B Z P_A``, by pseudo-inverses."""
    P_B, P_A = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    return P_B @ Z + Z @ P_A - P_B @ Z @ P_A


def tangent_gradient(mA: Tensor, mB: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Eq. 14 of the paper, of ``mA`` in the place of ``BᵀG`` and ``mB`` of ``G Aᵀ``."""
    P_A = torch.linalg.pinv(A) @ A
    return torch.linalg.pinv(B).T @ mA @ (torch.eye(len(P_A), dtype=A.dtype) - P_A) + mB @ torch.linalg.pinv(A).T


def dense_step(X: Tensor, A: Tensor, B: Tensor, tau: int) -> tuple[Tensor, Tensor, Tensor]:
    """``X_τ`` (eq. 12), and the ``δA``, ``δB`` (eq. 16, 18) with ``δB A + B δA = −X_τ``."""
    for _ in range(tau):
        X = projected(msign(X), A, B)
    dB = -X @ torch.linalg.pinv(A)
    dA = torch.linalg.pinv(B) @ (-X - dB @ A)
    return X, dA, dB


@pytest.mark.parametrize("tau", [1, 2, 3, 5])
def test_equals_the_papers_equations(tau):
    pairs, lr, beta, wd = make_pairs(), 0.3, 0.9, 0.2
    expected, c = [], math.sqrt(1 - lr * wd)
    for (A, B), W in zip(pairs, targets(pairs), strict=True):
        a, b = A.detach().clone(), B.detach().clone()
        mA, mB = torch.zeros_like(a), torch.zeros_like(b)
        for _ in range(8):
            G = b @ a - W
            mA, mB = beta * mA + (1 - beta) * b.T @ G, beta * mB + (1 - beta) * G @ a.T
            _, dA, dB = dense_step(tangent_gradient(mA, mB, a, b), a, b, tau)
            a, b = c * a + lr * dA / c, c * b + lr * dB / c
        expected += [a, b]
    settings = {
        "lr": lr,
        "momentum": beta,
        "weight_decay": wd,
        "trust": 0.0,
        "rank_power": 0.0,
        "layer_power": 0.0,
        "projections": tau,
    }
    optimizer = LoRATSD([pair_group(pairs)], **settings)
    descend(pairs, optimizer, 8)
    for found, reference in zip(values(pairs), expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-8, atol=1e-9)
    assert optimizer.stats == {"fallbacks": 0}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("m", "n", "r", "directions"), [(60, 40, 8, 200), (60, 40, 8, 3), (27, 40, 16, 200), (8, 8, 8, 99)]
)
def test_a_step_moves_the_product_along_the_dense_direction(dtype, m, n, r, directions):
    """Also with fewer directions than ranks, and where ``2r`` or ``r`` fill the matrix."""
    generator = torch.Generator().manual_seed(3)
    A, B, left, right = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((r, n), (m, r), (m, directions), (directions, n))
    )
    G = left * torch.logspace(0, -1, directions, dtype=torch.float64) @ right
    pair = nn.Parameter(A.to(dtype)), nn.Parameter(0.1 * B.to(dtype))
    a, b = (p.detach().double().clone() for p in pair)
    pair[0].grad, pair[1].grad = (b.T @ G).to(dtype), (G @ a.T).to(dtype)
    X, _, _ = dense_step(projected(G, a, b), a, b, tau=3)
    LoRATSD([pair_group([pair])], lr=0.1, momentum=0.0, trust=0.0, rank_power=0.0, layer_power=0.0).step()
    dA, dB = pair[0].detach().double() - a, pair[1].detach().double() - b
    assert relative_distance([dB @ a + b @ dA], [-0.1 * X]) < (1e-9 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("projections", [2, 3, 6, 7])
@pytest.mark.parametrize("zero", [None, "N", "P"])
def test_rounds_in_float32_come_to_those_in_float64(projections, zero):
    """``N`` or ``P`` is zero where only one factor is trained."""
    T = torch.randn(5, 16, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    T += 4 * torch.eye(16, dtype=torch.float64).roll(8, 0)  # no singular value near the floor
    T[:, 8:, 8:] = 0.0
    if zero == "N":
        T[:, :8, 8:] = 0.0
    if zero == "P":
        T[:, 8:, :8] = 0.0
    exact, found = (flattened(x, projections) for x in (T, T.float()))
    assert relative_distance([found.double()], [exact]) < 1e-4


def test_one_projection_is_the_direction_of_riemannion():
    """``P_T(msign(P_T(G)))`` (arXiv 2507.12142) of full gradients; and its gain is the nuclear norm of ``P_T(G)``."""
    pairs, lr = make_pairs(), 1e-2
    before = values(pairs)
    full = quadratic_gradients(pairs, targets(pairs))
    settings = {"momentum": 0.0, "trust": 0.0, "rank_power": 0.0, "layer_power": 0.0}
    LoRATSD([pair_group(pairs)], lr=lr, projections=1, **settings).step()
    for i, ((A, B), G) in enumerate(zip(pairs, full, strict=True)):
        a, b = before[2 * i], before[2 * i + 1]
        moved = (B.detach() - b) @ a + b @ (A.detach() - a)
        P_B, P_A = b @ torch.linalg.pinv(b), torch.linalg.pinv(a) @ a
        g = G - (torch.eye(len(P_B)) - P_B) @ G @ (torch.eye(len(P_A)) - P_A)
        Z = msign(g)
        torch.testing.assert_close(moved, -lr * (P_B @ Z + Z @ P_A - P_B @ Z @ P_A), rtol=1e-8, atol=1e-11)
        torch.testing.assert_close((moved * G).sum(), -lr * torch.linalg.svdvals(g).sum(), rtol=1e-8, atol=0)


@pytest.mark.parametrize(("scaling", "power"), [(0.25, 0.0), (4.0, 0.0), (-4.0, 0.5)])
def test_a_step_has_the_size_that_lr_says(scaling, power):
    spreads = []
    for projections in (1, 3, 20):
        pairs, lr = make_pairs(), 1e-3
        before = values(pairs)
        for (A, B), G in zip(pairs, targets(pairs), strict=True):
            A.grad, B.grad = scaling * B.detach().T @ G, scaling * G @ A.detach().T
        group = pair_group(pairs, scalings=[scaling] * 4)
        LoRATSD([group], lr=lr, trust=0.0, rank_power=power, layer_power=0.0, projections=projections).step()
        for i, (A, B) in enumerate(pairs):
            a, b = before[2 * i], before[2 * i + 1]
            moved = scaling * ((B.detach() - b) @ a + b @ (A.detach() - a)) * len(a) ** power
            S = torch.linalg.svdvals(moved)[: 2 * len(a)] / lr
            assert S[0] <= math.sqrt(2) and S[2 * len(a) - 1] > 0.2
            spreads.append(float((S - 1).abs().max()))
    first, third, last = (max(spreads[i : i + 4]) for i in (0, 4, 8))
    assert last < 1e-4 < third < 0.6 * first


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
@pytest.mark.parametrize("trust", [0.0, 0.02])
def test_does_not_see_the_factorisation(dtype, tolerance, trust):
    results = []
    for change in (None, general):
        pairs = cast(make_pairs() if change is None else regauge(make_pairs(), change), dtype)
        optimizer = LoRATSD([pair_group(pairs)], lr=0.2, momentum=0.9, weight_decay=0.3, trust=trust)
        results.append([x.double() for x in descend(pairs, optimizer, 9)])
        assert optimizer.stats == {"fallbacks": 0}
    assert relative_distance(results[1], results[0]) < tolerance
    assert relative_distance([(B @ A).detach() for A, B in make_pairs()], results[0]) > 0.1


@pytest.mark.parametrize("scaling", [1.0, 0.25])
@pytest.mark.parametrize("size", [1e-6, 1e-2, 1.0])
def test_trust_bounds_the_change_of_A_and_leaves_B_alone(size, scaling):
    """``δA = B⁺ (U D Uᵀ)(…)`` with ``D = W(W + c²)⁻¹``, ``W`` of ``BA`` in orthonormal bases, ``c = η/(2·trust)``."""
    lr, trust, moved = 0.1, 0.05, []
    for bound in (trust, 0.0):
        pairs = make_pairs()
        for _, B in pairs:
            B.data *= size
        quadratic_gradients(pairs, targets(pairs))
        group = pair_group(pairs, scalings=[scaling] * 4)
        before = values(pairs)
        LoRATSD([group], lr=lr, momentum=0.0, trust=bound, rank_power=0.5, layer_power=0.0).step()
        moved.append([after - x for after, x in zip(values(pairs), before, strict=True)])
    step, published = moved
    for i in range(len(pairs)):
        a, b = before[2 * i], before[2 * i + 1]
        root = torch.linalg.cholesky(a @ a.T)
        assert torch.linalg.matrix_norm(torch.linalg.solve(root, step[2 * i]), 2) <= trust * (1 + 1e-9)
        R = torch.linalg.qr(b).R
        W, c = R @ a @ a.T @ R.T, lr / len(a) ** 0.5 / scaling / (2 * trust)
        D = W @ torch.linalg.inv(W + c**2 * torch.eye(len(a), dtype=a.dtype))
        wanted = torch.linalg.solve(R, D @ R @ published[2 * i])
        torch.testing.assert_close(step[2 * i], wanted, rtol=1e-6, atol=1e-9 * float(wanted.abs().max()))
        torch.testing.assert_close(step[2 * i + 1], published[2 * i + 1], rtol=1e-12, atol=0)


@pytest.mark.parametrize("still", [0, 1])
def test_a_factor_alone_takes_all_that_it_can_follow(still):
    """With A or B frozen the tangent space is that of the other: LoRA-Muon's half of the step, at full length."""
    pairs, lr = make_pairs(), 1e-2
    before = values(pairs)
    full = quadratic_gradients(pairs, targets(pairs))
    for pair in pairs:
        pair[still].grad = None
    optimizer = LoRATSD([pair_group(pairs)], lr=lr, momentum=0.0, trust=0.0, rank_power=0.0, layer_power=0.0)
    optimizer.step()
    for i, ((A, B), G) in enumerate(zip(pairs, full, strict=True)):
        a, b = before[2 * i], before[2 * i + 1]
        P = b @ torch.linalg.pinv(b) @ G if still else G @ torch.linalg.pinv(a) @ a
        torch.testing.assert_close((B @ A).detach() - b @ a, -lr * msign(P), rtol=1e-7, atol=1e-10)
        assert torch.equal(pairs[i][still].detach(), before[2 * i + still])


def test_kernels_are_taken_as_matrices():
    pairs = make_pairs(((10, 12, 3),))
    (A, B) = pairs[0]
    conv = [(nn.Parameter(A.detach().view(3, 3, 2, 2).clone()), nn.Parameter(B.detach()[..., None, None].clone()))]
    first, second = LoRATSD([pair_group(pairs)], lr=0.05), LoRATSD([pair_group(conv)], lr=0.05)
    for _ in range(3):
        quadratic_gradients(pairs, targets(pairs))
        conv[0][0].grad, conv[0][1].grad = A.grad.view(3, 3, 2, 2), B.grad[..., None, None]
        first.step()
        second.step()
    assert torch.equal(conv[0][0].flatten(1), A) and torch.equal(conv[0][1].flatten(1), B)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"projections": 0}, "projections: got 0, must be a whole number"),
        ({"projections": 2.5}, "projections: got 2.5, must be a whole number"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        LoRATSD([pair_group(make_pairs())], **settings)
