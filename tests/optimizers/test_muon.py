"""LoRA-Muon: a literal transcription, the size of its steps, and what it does not see."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dreamlora.optimizers import LoRAMuon
from tests.optimizers.lora_problems import (
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


def power(K: Tensor, exponent: float) -> Tensor:
    e, Q = torch.linalg.eigh(K)
    return Q @ torch.diag(e**exponent) @ Q.T


def msign(Z: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(Z, full_matrices=False)
    return U @ Vh


def test_equals_the_papers_equations():
    pairs, lr, beta, wd = make_pairs(), 0.3, 0.9, 0.2
    wanted = targets(pairs)
    expected = []
    for (A, B), W in zip(pairs, wanted, strict=True):
        a, b = A.detach().clone(), B.detach().clone()
        mA, mB, c = torch.zeros_like(a), torch.zeros_like(b), (1 - lr * wd) ** 0.5
        for _ in range(8):
            G = b @ a - W
            mA, mB = beta * mA + (1 - beta) * b.T @ G, beta * mB + (1 - beta) * G @ a.T
            KA, KB = power(a @ a.T, -0.5), power(b.T @ b, -0.5)
            dA, dB = -lr / 2 * KB @ msign(KB @ mA), -lr / 2 * msign(mB @ KA) @ KA
            a, b = c * a + dA / c, c * b + dB / c
        expected += [a, b]
    optimizer = LoRAMuon(
        [pair_group(pairs)], lr=lr, momentum=beta, weight_decay=wd, trust=0.0, rank_power=0.0, layer_power=0.0
    )
    descend(pairs, optimizer, 8)
    for found, reference in zip(values(pairs), expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-8, atol=1e-9)
    assert optimizer.stats == {"fallbacks": 0}


@pytest.mark.parametrize(("scaling", "power"), [(0.25, 0.0), (4.0, 0.0), (4.0, 0.5)])
def test_a_step_has_the_size_that_lr_says(scaling, power):
    pairs, lr = make_pairs(), 1e-3
    before = values(pairs)
    quadratic_gradients(pairs, targets(pairs))
    LoRAMuon([pair_group(pairs, scalings=[scaling] * 4)], lr=lr, trust=0.0, rank_power=power, layer_power=0.0).step()
    for i, (A, B) in enumerate(pairs):
        a, b = before[2 * i], before[2 * i + 1]
        from_B, from_A = scaling * (B.detach() - b) @ a, scaling * b @ (A.detach() - a)
        r = len(a)
        for part in (from_B, from_A):  # all singular values are lr/2
            wanted = torch.full((r,), lr / 2 * r**-power, dtype=a.dtype)
            torch.testing.assert_close(torch.linalg.svdvals(part)[:r], wanted, rtol=1e-8, atol=0)
        assert torch.linalg.matrix_norm(from_A + from_B, 2) <= lr * (1 + 1e-9)


@pytest.mark.parametrize("trust", [0.0, 0.02])
def test_does_not_see_the_factorisation(trust):
    pairs = make_pairs()
    other = regauge(pairs, general)
    settings = {"lr": 0.2, "momentum": 0.9, "weight_decay": 0.3, "trust": trust}
    expected = descend(pairs, LoRAMuon([pair_group(pairs)], **settings), 9)
    found = descend(other, LoRAMuon([pair_group(other)], **settings), 9)
    assert relative_distance(found, expected) < 1e-10
    assert relative_distance([(B @ A).detach() for A, B in make_pairs()], expected) > 0.1


def test_damping_shortens_steps_in_weak_directions_of_the_partner():
    lengths = []
    for damping in (0.0, 1.0):
        pairs = make_pairs(((8, 6, 2),))
        A, B = pairs[0]
        B.data = torch.linalg.qr(B.detach()).Q * torch.tensor([1.0, 1e-3], dtype=B.dtype)
        before = A.detach().clone()
        quadratic_gradients(pairs, targets(pairs))
        LoRAMuon([pair_group(pairs)], lr=0.1, damping=damping, trust=0.0, rank_power=0.0, layer_power=0.0).step()
        lengths.append((A.detach() - before).norm(dim=1))
    assert lengths[0][1] > 45 and lengths[1][1] < 0.1


@pytest.mark.parametrize("scaling", [1.0, 0.25])
@pytest.mark.parametrize("size", [1e-6, 1e-2, 1.0])
def test_trust_bounds_the_change_of_A_and_leaves_B_alone(size, scaling):
    """``δA = −η K_B^-½ D msign(K_B^-½ mA)``, ``D = W(W + c²)⁻¹``, ``W = K_B^½ K_A K_B^½``, ``c = η/(2·trust)``."""
    lr, trust = 0.1, 0.05
    moved = []
    for bound in (trust, 0.0):
        pairs = make_pairs()
        for _, B in pairs:
            B.data *= size
        quadratic_gradients(pairs, targets(pairs))
        group = pair_group(pairs, scalings=[scaling] * 4)
        optimizer = LoRAMuon([group], lr=lr, momentum=0.0, trust=bound, rank_power=0.5, layer_power=0.0)
        before = values(pairs)
        optimizer.step()
        moved.append([after - x for after, x in zip(values(pairs), before, strict=True)])
    step, published = moved
    for i in range(len(pairs)):
        a, b = before[2 * i], before[2 * i + 1]
        KA, root = a @ a.T, power(b.T @ b, 0.5)
        assert torch.linalg.matrix_norm(power(KA, -0.5) @ step[2 * i], 2) <= trust * (1 + 1e-9)
        W, c = root @ KA @ root, lr / len(a) ** 0.5 / scaling / 2 / (2 * trust)
        D = W @ torch.linalg.inv(W + c**2 * torch.eye(len(a), dtype=a.dtype))
        wanted = torch.linalg.solve(root, D @ root @ published[2 * i])
        torch.testing.assert_close(step[2 * i], wanted, rtol=1e-6, atol=1e-9 * float(wanted.abs().max()))
        torch.testing.assert_close(step[2 * i + 1], published[2 * i + 1], rtol=1e-12, atol=0)
