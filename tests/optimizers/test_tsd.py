"""LoRA-TSD against dense matrices: full gradients, projection operators, SVD; the size of its steps; what it does not see."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dreamlora.optimizers import LoRATSD
from tests.optimizers.lora_problems import (
    SHAPES,
    Pairs,
    descend,
    general,
    make_pairs,
    pair_group,
    quadratic_gradients,
    regauge,
    relative_distance,
    targets,
)


def values(pairs: Pairs) -> list[Tensor]:
    return [p.detach().clone() for pair in pairs for p in pair]


def msign(Z: Tensor) -> Tensor:
    """``U Vᵀ`` of the singular vectors that belong to more than rounding."""
    U, S, Vh = torch.linalg.svd(Z, full_matrices=False)
    return U[:, S > 1e-10 * S[0]] @ Vh[S > 1e-10 * S[0]]


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
    settings = {"lr": lr, "momentum": beta, "weight_decay": wd, "trust": 0.0, "rank_power": 0.0, "projections": tau}
    optimizer = LoRATSD([pair_group(pairs)], **settings)
    descend(pairs, optimizer, 8)
    for found, reference in zip(values(pairs), expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-8, atol=1e-9)
    assert optimizer.stats == {"fallbacks": 0}
