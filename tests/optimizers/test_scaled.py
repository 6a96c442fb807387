"""Scaled GD and Scaled AdamW: the equations, what they reduce to, and what they leave invariant."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreamlora.optimizers import ScaledAdamW, ScaledGD, _pairs, _scaled_base
from tests.optimizers.lora_problems import (
    descend,
    general,
    make_pairs,
    pair_group,
    quadratic_gradients,
    regauge,
    relative_distance,
    scaled_rotation,
    targets,
)


def factors(pairs) -> list[Tensor]:
    return [p.detach().clone() for pair in pairs for p in pair]


# ---------------------------------------------------------------- Scaled GD


def test_scaled_gd_steps_by_the_two_projected_gradients():
    pairs, s, lr = make_pairs(), 0.5, 0.3
    before = [(A.detach().clone(), B.detach().clone()) for A, B in pairs]
    full = quadratic_gradients(pairs, targets(pairs), s)
    ScaledGD([pair_group(pairs)], lr=lr, damping=0.0).step()
    for (A, B), (A0, B0), G in zip(pairs, before, full, strict=True):
        moved = s * ((B - B0) @ A0 + B0 @ (A - A0))
        P_B = B0 @ torch.linalg.pinv(B0)
        P_A = torch.linalg.pinv(A0) @ A0
        torch.testing.assert_close(moved.detach(), -lr * s**2 * (P_B @ G + G @ P_A), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_scaled_gd_without_damping_does_not_see_the_factorisation(momentum):
    pairs = make_pairs()
    other = regauge(pairs, general)
    expected = descend(pairs, ScaledGD([pair_group(pairs)], lr=0.1, momentum=momentum, damping=0.0), 5)
    found = descend(other, ScaledGD([pair_group(other)], lr=0.1, momentum=momentum, damping=0.0), 5)
    assert relative_distance(found, expected) < 1e-12


def changed_by(make_R, **options) -> float:
    pairs = make_pairs()
    other = regauge(pairs, make_R)
    expected = descend(pairs, ScaledGD([pair_group(pairs)], lr=0.1, **options), 5)
    return relative_distance(descend(other, ScaledGD([pair_group(other)], lr=0.1, **options), 5), expected)


def test_relative_damping_does_not_see_scale_and_rotation_and_absolute_damping_does():
    assert changed_by(scaled_rotation, damping=0.1) < 1e-12
    assert changed_by(scaled_rotation, damping=1.0, damping_mode="absolute") > 0.05


def test_relative_damping_tends_to_full_invariance():
    large, small = changed_by(general, damping=0.1), changed_by(general, damping=1e-9)
    assert small < 1e-6 < large


def test_scaled_gd_momentum_and_decay_by_hand():
    pairs = make_pairs(((4, 5, 2),))
    (A, B), lr, mu, wd, delta = pairs[0], 0.1, 0.9, 0.2, 0.05
    a, b = A.detach().clone(), B.detach().clone()
    mA, mB = torch.zeros_like(a), torch.zeros_like(b)
    W = targets(pairs)[0]
    optimizer = ScaledGD([pair_group(pairs)], lr=lr, momentum=mu, weight_decay=wd, damping=delta)
    descend(pairs, optimizer, 3)
    for _ in range(3):
        G = b @ a - W
        KA, KB, eye = a @ a.T, b.T @ b, torch.eye(2, dtype=a.dtype)
        mA = mu * mA + torch.linalg.inv(KB + delta * KB.trace() / 2 * eye) @ (b.T @ G)
        mB = mu * mB + (G @ a.T) @ torch.linalg.inv(KA + delta * KA.trace() / 2 * eye)
        a, b = (1 - lr * wd) * a - lr * mA, (1 - lr * wd) * b - lr * mB
    torch.testing.assert_close(A.detach(), a, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(B.detach(), b, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------- Scaled AdamW


def reference_scaled_adamw(pairs, wanted, steps, *, lr, betas, eps, wd, damping):
    """One pair at a time, plain inverses, moments written out: an independent computation."""
    result = []
    for (A, B), W in zip(pairs, wanted, strict=True):
        a, b = A.detach().clone(), B.detach().clone()
        moments = [torch.zeros_like(x) for x in (a, a, b, b)]
        for t in range(1, steps + 1):
            G = b @ a - W
            scaled = []
            for K in (b.T @ b, a @ a.T):
                eye = torch.eye(len(K), dtype=K.dtype)
                K = K * len(K) / K.trace() if K.trace() > 0 else (1 - damping) * eye
                scaled.append(torch.linalg.inv(K + damping * eye))
            directions = (scaled[0] @ (b.T @ G), (G @ a.T) @ scaled[1])
            new = []
            for i, (p, d) in enumerate(zip((a, b), directions, strict=True)):
                moments[2 * i] = betas[0] * moments[2 * i] + (1 - betas[0]) * d
                moments[2 * i + 1] = betas[1] * moments[2 * i + 1] + (1 - betas[1]) * d * d
                m, v = moments[2 * i] / (1 - betas[0] ** t), moments[2 * i + 1] / (1 - betas[1] ** t)
                new.append((1 - lr * wd) * p - lr * m / (v.sqrt() + eps))
            a, b = new
        result += [a, b]
    return result


@pytest.mark.parametrize("damping", [0.1, 1e-5])
@pytest.mark.parametrize("batch_bytes", [1, 2**19])
@pytest.mark.parametrize("zero_B", [False, True])
def test_batched_equals_one_pair_at_a_time(monkeypatch, damping, batch_bytes, zero_B):
    monkeypatch.setitem(_pairs._BATCH_BYTES, "cpu", batch_bytes)
    monkeypatch.setitem(_scaled_base._PORTION, "cpu", batch_bytes // 4)
    pairs = make_pairs(zero_B=zero_B)
    settings = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6}
    expected = reference_scaled_adamw(pairs, targets(pairs), 6, **settings, wd=0.1, damping=damping)
    optimizer = ScaledAdamW([pair_group(pairs)], **settings, weight_decay=0.1, damping=damping)
    descend(pairs, optimizer, 6)
    for found, wanted in zip(factors(pairs), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)
    assert optimizer.stats == {"fallbacks": 0}


def assert_same_path(shapes, tolerance, adamw_eps, **options):
    ours, theirs = make_pairs(shapes, zero_B=True), make_pairs(shapes, zero_B=True)
    common = {"lr": 0.02, "weight_decay": 0.1}
    descend(ours, ScaledAdamW([pair_group(ours)], **common, **options), 8)
    descend(theirs, torch.optim.AdamW([p for pair in theirs for p in pair], **common, eps=adamw_eps), 8)
    for found, wanted in zip(factors(ours), factors(theirs), strict=True):
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def test_rank_one_is_adamw_with_a_larger_eps():
    assert_same_path(((6, 5, 1), (4, 7, 1)), 1e-12, adamw_eps=1e-3 * 1.25, eps=1e-3, damping=0.25)


def test_large_relative_damping_is_adamw():
    assert_same_path(((6, 5, 3), (4, 7, 2)), 1e-6, adamw_eps=1e-8 * (1 + 1e-8), eps=1e-16, damping=1e8)


def rms_step_of_A(make_optimizer, at: int) -> float:
    """RMS(δA)/lr at step ``at``: rank-8 target with singular values 1 to 0.03, noisy gradients, B = 0."""
    generator = torch.Generator().manual_seed(0)
    m, n, r, lr = 96, 64, 8, 1e-3
    U, V = (torch.linalg.qr(torch.randn(size, r, generator=generator)).Q for size in (m, n))
    W = U @ torch.diag(torch.logspace(0, -1.5, r)) @ V.T
    A = nn.Parameter((torch.rand(r, n, generator=generator) * 2 - 1) / n**0.5)
    B = nn.Parameter(torch.zeros(m, r))
    optimizer = make_optimizer(A, B, lr)
    before = A.detach()
    for _ in range(at):
        G = (B @ A - W).detach()
        G = G + 0.05 * G.norm() / G.numel() ** 0.5 * torch.randn(m, n, generator=generator)
        A.grad, B.grad = B.detach().T @ G, G @ A.detach().T
        before = A.detach().clone()
        optimizer.step()
    return float((A.detach() - before).square().mean().sqrt() / lr)


def test_steps_after_the_zero_start_do_not_poison_the_second_moment():
    def scaled(**options):
        return lambda A, B, lr: ScaledAdamW([pair_group([(A, B)])], lr=lr, weight_decay=0.0, **options)

    adamw = rms_step_of_A(lambda A, B, lr: torch.optim.AdamW([A, B], lr=lr, weight_decay=0.0), 30)
    normalised = rms_step_of_A(scaled(damping=0.1), 30)
    published = rms_step_of_A(scaled(damping=1e-6, damping_mode="absolute"), 30)
    assert normalised > 0.8 * adamw
    assert published < 0.6 * adamw  # why the normalisation exists


# ---------------------------------------------------------------- both


@pytest.mark.parametrize("cls", [ScaledAdamW, ScaledGD])
@pytest.mark.parametrize("damping", [0.0, 1e-5, 0.1])
def test_zero_factors_stay_finite_and_train(cls, damping):
    for flip in (False, True):
        pairs = make_pairs(dtype=torch.float32, zero_B=True)
        if flip:  # the mirror case: embeddings and some initialisations start with A = 0
            pairs = [(nn.Parameter(B.detach().T.clone()), nn.Parameter(A.detach().T.clone())) for A, B in pairs]
        start = [(A.detach().clone(), B.detach().clone()) for A, B in pairs]
        optimizer = cls([pair_group(pairs)], lr=1e-2, weight_decay=0.0, damping=damping)
        for step in range(3):
            quadratic_gradients(pairs, targets(pairs))
            optimizer.step()
            for (A, B), (A0, B0) in zip(pairs, start, strict=True):
                assert A.isfinite().all() and B.isfinite().all()
                still, still0, moving, moving0 = (B, B0, A, A0) if flip else (A, A0, B, B0)
                assert step > 0 or torch.equal(still, still0)
                assert not torch.equal(moving, moving0)


@pytest.mark.parametrize("cls", [ScaledAdamW, ScaledGD])
def test_conv_pair_equals_the_linear_pair_on_unfolded_input(cls):
    generator = torch.Generator().manual_seed(3)
    c, r, m = 3, 2, 5
    A = torch.randn(r, c, 3, 3, generator=generator, dtype=torch.float64)
    B = torch.randn(m, r, 1, 1, generator=generator, dtype=torch.float64)
    x = torch.randn(2, c, 6, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(2, m, 6, 6, generator=generator, dtype=torch.float64)
    conv = (nn.Parameter(A), nn.Parameter(B))
    last = tuple(nn.Parameter(p.detach().clone(memory_format=torch.channels_last)) for p in (A, B))
    linear = (nn.Parameter(A.flatten(1).clone()), nn.Parameter(B.flatten(1).clone()))
    for a, b in (conv, last, linear):
        optimizer = cls([pair_group([(a, b)])], lr=0.01)
        for _ in range(4):
            optimizer.zero_grad()
            if a.ndim == 4:
                out = F.conv2d(F.conv2d(x, a, padding=1), b)
            else:
                out = (b @ a @ F.unfold(x, 3, padding=1)).view_as(y)
            (out - y).square().mean().backward()
            optimizer.step()
    for other in (conv, last):
        torch.testing.assert_close(other[0].flatten(1), linear[0], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(other[1].flatten(1), linear[1], rtol=1e-9, atol=1e-11)


def test_failed_inversions_are_counted_and_leave_the_gradient_unscaled():
    pairs = make_pairs(((4, 5, 2),))
    pairs[0][1].data[:, 1] = pairs[0][1].data[:, 0] = 0.0
    pairs[0][1].data[0, 0] = 1.0  # BᵀB = diag(1, 0): singular, and there is no damping
    quadratic_gradients(pairs, targets(pairs))
    gradient, before = pairs[0][0].grad.clone(), pairs[0][0].detach().clone()
    optimizer = ScaledGD([pair_group(pairs)], lr=0.1, damping=0.0, damping_mode="absolute")
    optimizer.step()
    assert optimizer.stats == {"fallbacks": 1}
    torch.testing.assert_close(pairs[0][0].detach(), before - 0.1 * gradient)


@pytest.mark.parametrize("cls", [ScaledAdamW, ScaledGD])
def test_lora_plus_ratio_scales_the_step_of_B_alone(cls):
    steps = []
    for ratio in (1.0, 4.0):
        pairs = make_pairs()
        before = factors(pairs)
        descend(pairs, cls([pair_group(pairs, lr_ratio_B=ratio)], lr=0.01, weight_decay=0.0), 1)
        steps.append([p - q for p, q in zip(factors(pairs), before, strict=True)])
    for i, (once, four) in enumerate(zip(*steps, strict=True)):
        torch.testing.assert_close(four, once * (4.0 if i % 2 else 1.0))


@pytest.mark.parametrize("cls", [ScaledAdamW, ScaledGD])
def test_maximize_is_the_negated_gradient(cls):
    down, up = make_pairs(), make_pairs()
    quadratic_gradients(down, targets(down))
    quadratic_gradients(up, targets(up))
    for pair in up:
        for p in pair:
            p.grad.neg_()
    cls([pair_group(down)], lr=0.01).step()
    cls([pair_group(up)], lr=0.01, maximize=True).step()
    for x, y in zip(factors(down), factors(up), strict=True):
        assert torch.equal(x, y)
