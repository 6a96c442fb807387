"""Order, variant, geometry, transported momentum, scale correction: equations, invariances, exclusions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dreamlora import registry
from dreamlora.optimizers import ScaledAdamW, ScaledGD
from dreamlora.optimizers._batch import PairBatch
from dreamlora.optimizers._preconditioners import PreconditionerRecipe
from tests.optimizers.lora_problems import (
    general,
    make_pairs,
    pair_group,
    quadratic_gradients,
    regauge,
    relative_distance,
    scaled_rotation,
    targets,
)


def copies(pairs):
    return [(A.detach().clone(), B.detach().clone()) for A, B in pairs]


def train(pairs, optimizer, steps: int, clip: float | None = None) -> list[torch.Tensor]:
    """The products ``BA`` after so many steps on the quadratic."""
    for _ in range(steps):
        quadratic_gradients(pairs, targets(pairs))
        if clip is not None:
            optimizer.clip_lora_grad_norm_(clip, damping=0.0)
        optimizer.step()
    return [(B @ A).detach() for A, B in pairs]


def invariance(cls, make_R, clip=None, **options) -> float:
    """Largest relative change of a product after six steps, when it was factored otherwise at the start."""
    pairs = make_pairs()
    other = regauge(pairs, make_R)
    expected = train(pairs, cls([pair_group(pairs)], **options), 6, clip)
    return relative_distance(train(other, cls([pair_group(other)], **options), 6, clip), expected)


# ---------------------------------------------------------------- invariance

EXACT = [
    {},
    {"order": "gauss_seidel"},
    {"geometry": "tangent"},
    {"geometry": "balanced"},
    {"transport_momentum": True},
    {"transport_momentum": True, "order": "gauss_seidel"},
    {"transport_momentum": True, "geometry": "tangent"},
]


def label(options) -> str:
    return "-".join(str(value) for value in options.values()) or "default"


@pytest.mark.parametrize("options", EXACT, ids=label)
def test_undamped_gd_does_not_see_the_factorisation(options):
    found = invariance(ScaledGD, general, clip=1.0, lr=0.1, momentum=0.9, weight_decay=0.1, damping=0.0, **options)
    assert found < 1e-10


@pytest.mark.parametrize("options", [*EXACT, {"variant": "split"}], ids=label)
def test_damped_gd_does_not_see_scale_and_rotation(options):
    found = invariance(ScaledGD, scaled_rotation, clip=1.0, lr=0.1, momentum=0.9, weight_decay=0.1, **options)
    assert found < 1e-10


def scalar(r: int) -> torch.Tensor:
    return 30.0 * torch.eye(r)


SPLIT = [{}, {"geometry": "tangent"}, {"geometry": "balanced"}, {"transport_momentum": True}, {"order": "gauss_seidel"}]


@pytest.mark.parametrize("options", SPLIT, ids=label)
def test_split_adamw_does_not_see_the_scale_of_the_factors_and_gradient_adamw_does(options):
    common = {"lr": 0.05, "weight_decay": 0.1, "eps": 1e-3}
    assert invariance(ScaledAdamW, scalar, clip=1.0, variant="split", **common, **options) < 1e-10
    assert invariance(ScaledAdamW, scalar, clip=1.0, **common) > 1e-2


def test_clipping_by_the_plain_norm_sees_the_factorisation():
    pairs = make_pairs()
    other = regauge(pairs, general)
    norms, plain = [], []
    for each in (pairs, other):
        optimizer = ScaledGD([pair_group(each)])
        quadratic_gradients(each, targets(each))
        gradients = [p.grad.clone() for pair in each for p in pair]
        plain.append(torch.stack([g.norm() for g in gradients]).norm())
        norms.append(optimizer.clip_lora_grad_norm_(0.5, damping=0.0))
        for p, before in zip((p for pair in each for p in pair), gradients, strict=True):
            torch.testing.assert_close(p.grad, before * 0.5 / (norms[-1] + 1e-6))
        torch.testing.assert_close(optimizer.clip_lora_grad_norm_(9.0, damping=0.0), torch.tensor(0.5).double())
    torch.testing.assert_close(*norms, rtol=1e-10, atol=0)
    assert abs(plain[0] / plain[1] - 1) > 0.05


def test_the_clipping_norm_is_the_size_of_the_projected_gradients():
    pairs = make_pairs(((6, 5, 2),))
    full = quadratic_gradients(pairs, targets(pairs), 0.5)
    (A, B), G = pairs[0], full[0]
    P_B, P_A = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
    expected = 0.5 * ((P_B @ G).square().sum() + (G @ P_A).square().sum()).sqrt()
    found = ScaledGD([pair_group(pairs)]).clip_lora_grad_norm_(1e9, damping=0.0)
    torch.testing.assert_close(found, expected.detach())


# ---------------------------------------------------------------- equations


def first_order_step(options, s=0.5, lr=0.3):
    """``(δW of one undamped step to first order, A, B, G)`` for every pair."""
    pairs = make_pairs()
    before = copies(pairs)
    full = quadratic_gradients(pairs, targets(pairs), s)
    ScaledGD([pair_group(pairs)], lr=lr, damping=0.0, **options).step()
    for (A, B), (A0, B0), G in zip(pairs, before, full, strict=True):
        yield (s * ((B - B0) @ A0 + B0 @ (A - A0))).detach() / (-lr * s**2), A0, B0, G


def test_the_tangent_geometry_steps_along_the_projected_gradient():
    for moved, A, B, G in first_order_step({"geometry": "tangent"}):
        P_B, P_A = B @ torch.linalg.pinv(B), torch.linalg.pinv(A) @ A
        torch.testing.assert_close(moved, P_B @ G + G @ P_A - P_B @ G @ P_A, rtol=1e-10, atol=1e-11)


def test_the_balanced_geometry_is_gradient_descent_on_balanced_factors():
    for moved, A, B, G in first_order_step({"geometry": "balanced"}):
        U, S, Vh = torch.linalg.svd(B @ A)
        r = A.shape[0]
        expected = G @ Vh[:r].T @ torch.diag(S[:r]) @ Vh[:r] + U[:, :r] @ torch.diag(S[:r]) @ U[:, :r].T @ G
        torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-11)


def root(K, delta):
    """``(K + δτI)^½`` by eigenvalues."""
    values, vectors = torch.linalg.eigh(K + delta * K.trace() / len(K) * torch.eye(len(K), dtype=K.dtype))
    return vectors @ torch.diag(values.sqrt()) @ vectors.T


@pytest.mark.parametrize("zero_B", [False, True])
def test_split_adamw_by_hand(zero_B):
    pairs = make_pairs(zero_B=zero_B)
    lr, betas, eps, wd, delta = 0.05, (0.8, 0.9), 1e-6, 0.1, 0.02
    settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": wd, "damping": delta}
    start = copies(pairs)
    train(pairs, ScaledAdamW([pair_group(pairs)], variant="split", **settings), 5)
    for (A, B), (a, b), W in zip(pairs, start, targets(pairs), strict=True):
        m, v = [torch.zeros_like(a), torch.zeros_like(b)], [torch.zeros_like(a), torch.zeros_like(b)]
        for t in range(1, 6):
            G = b @ a - W
            R_B = torch.linalg.inv(root(b.T @ b, delta)) if b.any() else torch.eye(len(a), dtype=a.dtype)
            R_A = torch.linalg.inv(root(a @ a.T, delta))
            steps = []
            for i, g in enumerate((R_B @ b.T @ G, G @ a.T @ R_A)):
                m[i] = betas[0] * m[i] + (1 - betas[0]) * g
                v[i] = betas[1] * v[i] + (1 - betas[1]) * g * g
                steps.append(m[i] / (1 - betas[0] ** t) / ((v[i] / (1 - betas[1] ** t)).sqrt() + eps))
            a, b = (1 - lr * wd) * a - lr * R_B @ steps[0], (1 - lr * wd) * b - lr * steps[1] @ R_A
        torch.testing.assert_close(A.detach(), a, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(B.detach(), b, rtol=1e-8, atol=1e-10)


def test_split_adamw_in_the_balanced_geometry_is_adamw_on_balanced_factors():
    """With ``S = KA⁻¹ # KB``, ``(B S^-½, S^½ A)`` have equal Gram matrices; AdamW's first step there is the sign."""
    pairs, lr = make_pairs(), 1e-3
    start = copies(pairs)
    quadratic_gradients(pairs, targets(pairs))
    common = {"eps": 0.0, "weight_decay": 0.0, "damping": 1e-13}
    ScaledAdamW([pair_group(pairs)], lr=lr, variant="split", geometry="balanced", **common).step()
    for (A, B), (a, b), W in zip(pairs, start, targets(pairs), strict=True):
        KA, KB = a @ a.T, b.T @ b
        inner = root(root(KA, 0.0) @ KB @ root(KA, 0.0), 0.0)
        S = torch.linalg.inv(root(KA, 0.0)) @ inner @ torch.linalg.inv(root(KA, 0.0))
        R, G = root(S, 0.0), b @ a - W
        balanced_A, balanced_B = R @ a, b @ torch.linalg.inv(R)
        torch.testing.assert_close(balanced_A @ balanced_A.T, balanced_B.T @ balanced_B)
        moved_A = balanced_A - lr * (balanced_B.T @ G).sign()
        moved_B = balanced_B - lr * (G @ balanced_A.T).sign()
        torch.testing.assert_close(A.detach(), torch.linalg.inv(R) @ moved_A, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(B.detach(), moved_B @ R, rtol=1e-7, atol=1e-9)


def test_gauss_seidel_order_with_transport_and_absolute_damping_is_altlora():
    """Heavy-ball form of arXiv 2505.12455: ``m ← μ T m + g̃`` with ``T = (BᵀB + λI)⁻¹ Bᵀ B_old``, A first."""
    pairs, lr, mu, reg = make_pairs(), 0.05, 0.9, 0.01
    start = copies(pairs)
    options = {"order": "gauss_seidel", "transport_momentum": True, "damping_mode": "absolute"}
    train(pairs, ScaledGD([pair_group(pairs)], lr=lr, momentum=mu, damping=reg, **options), 5)
    for (A, B), (a, b), W in zip(pairs, start, targets(pairs), strict=True):
        eye = reg * torch.eye(len(a), dtype=a.dtype)
        mA, mB, old_a, old_b = torch.zeros_like(a), torch.zeros_like(b), a, b
        for _ in range(5):
            G = b @ a - W
            D_B = torch.linalg.inv(b.T @ b + eye)
            mA = mu * D_B @ b.T @ old_b @ mA + D_B @ b.T @ G
            new_a = a - lr * mA
            D_A = torch.linalg.inv(new_a @ new_a.T + eye)
            mB = mu * mB @ old_a @ new_a.T @ D_A + G @ a.T @ D_A
            old_a, old_b = new_a, b
            a, b = new_a, b - lr * mB
        torch.testing.assert_close(A.detach(), a, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(B.detach(), b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("variant", ["gradient", "split"])
@pytest.mark.parametrize("cls", [ScaledAdamW, ScaledGD])
def test_momentum_is_carried_into_other_factors_of_the_same_product(cls, variant):
    """The other factor is replaced under the momentum: what it stands for in weights, ``B m``, must stay."""
    pairs = make_pairs(((8, 6, 2),))
    (A, B), key = pairs[0], "exp_avg" if cls is ScaledAdamW else "momentum_buffer"
    momentum = {"betas": (0.9, 0.99)} if cls is ScaledAdamW else {"momentum": 0.9}
    common = {"lr": 1e-2, "damping": 1e-12, "variant": variant, "transport_momentum": True, **momentum}
    optimizer = cls([pair_group(pairs)], **common)
    train(pairs, optimizer, 2)
    old = B.detach().clone()
    R = general(2)
    group = optimizer.param_groups[0]
    recipe = PreconditionerRecipe.of(group, cls is ScaledAdamW)
    portion = [PairBatch([A], [B], [1.0])]
    before = optimizer._frames(group, recipe, portion)
    lifted = lift(before[0], optimizer.state[A][key])
    B.data.copy_(old @ R)
    now = optimizer._frames(group, recipe, portion)
    optimizer._transport(before, now, "B")
    torch.testing.assert_close(lift(now[0], optimizer.state[A][key]), lifted, rtol=1e-6, atol=1e-9)


def lift(frame, m):
    """``B m`` with ``m`` in natural coordinates."""
    natural = m / frame.for_A.unit[0] if frame.for_A.after is None else frame.for_A.after[0] @ m
    return frame.factors[1][0] @ natural


def test_relative_damping_leaves_momentum_alone_while_the_other_factor_rests():
    kept = []
    for transport_momentum in (False, True):
        pairs = make_pairs()
        group = pair_group(pairs, lr_ratio_B=1e-12)  # B does not move
        train(pairs, ScaledGD([group], lr=0.05, momentum=0.9, transport_momentum=transport_momentum), 5)
        kept.append([A.detach() for A, _ in pairs])
    for x, y in zip(*kept, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-9)


# ---------------------------------------------------------------- scale correction


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (ScaledGD, {"momentum": 0.9, "lr": 0.1}),
        (ScaledAdamW, {"variant": "split", "lr": 0.02, "eps": 0.0}),
        (ScaledAdamW, {"variant": "split", "geometry": "tangent", "lr": 0.02, "eps": 0.0}),
    ],
    ids=["gd", "split", "split-tangent"],
)
@pytest.mark.parametrize("mixed", [False, True])
def test_scale_correction_makes_the_weights_independent_of_alpha(cls, options, mixed):
    """``s·BA`` is the same whatever ``s`` is, if it starts the same: here with B times 1/s."""
    paths = []
    for s in (1.0, 0.125):
        pairs = make_pairs(zero_B=False)
        scalings = [s, 1.0, s, 1.0] if mixed else [s] * len(pairs)
        for (_, B), each in zip(pairs, scalings, strict=True):
            B.data /= each
        optimizer = cls([pair_group(pairs, scalings=scalings)], scale_correction=True, weight_decay=0.1, **options)
        wanted = targets(pairs)
        for _ in range(4):
            for pair, W, each in zip(pairs, wanted, scalings, strict=True):
                quadratic_gradients([pair], [W], each)
            optimizer.step()
        paths.append([(each * B @ A).detach() for (A, B), each in zip(pairs, scalings, strict=True)])
    assert relative_distance(*paths) < 1e-9


# ---------------------------------------------------------------- exclusions


@pytest.mark.parametrize(
    ("cls", "options", "names"),
    [
        (ScaledAdamW, {"variant": "split", "damping_mode": "absolute"}, ("variant", "damping_mode")),
        (ScaledAdamW, {"geometry": "balanced", "damping_mode": "absolute"}, ("geometry", "damping_mode")),
        (ScaledGD, {"geometry": "tangent", "order": "gauss_seidel"}, ("geometry", "order")),
        (ScaledGD, {"geometry": "balanced", "order": "gauss_seidel"}, ("geometry", "order")),
        (
            ScaledAdamW,
            {"geometry": "balanced", "transport_momentum": True},
            ("geometry", "transport_momentum"),
        ),
        (ScaledGD, {"transport_momentum": True}, ("transport_momentum", "momentum")),
        (ScaledAdamW, {"transport_momentum": True, "betas": (0.0, 0.9)}, ("transport_momentum", "betas")),
        (ScaledGD, {"variant": "split"}, ("variant", "momentum")),
    ],
)
def test_options_that_exclude_each_other_are_both_named(cls, options, names):
    name = "scaled_adamw" if cls is ScaledAdamW else "scaled_gd"
    for make in (
        lambda: cls([pair_group(make_pairs())], **options),
        lambda: registry.load("optimizers", name).Options(**options),
    ):
        with pytest.raises(ValueError, match=f"{names[0]}: got") as caught:
            make()
        assert names[1] in str(caught.value) and "must" in str(caught.value)


def test_a_scaling_of_zero_cannot_be_corrected():
    with pytest.raises(ValueError, match="scale_correction: got True"):
        ScaledGD([pair_group(make_pairs(((4, 5, 2),)), scalings=[0.0])], scale_correction=True)


# ---------------------------------------------------------------- every combination


COMBINATIONS = [
    {"variant": "split"},
    {"variant": "split", "geometry": "balanced"},
    {"variant": "split", "transport_momentum": True},
    {"variant": "split", "order": "gauss_seidel"},
    {"geometry": "tangent"},
    {"geometry": "balanced"},
    {"order": "gauss_seidel", "transport_momentum": True},
    {"damping_mode": "absolute", "transport_momentum": True},
]


@pytest.mark.parametrize("options", COMBINATIONS, ids=label)
@pytest.mark.parametrize("cls", [ScaledAdamW, ScaledGD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_zero_factor_stays_finite_and_the_loss_falls(cls, options, dtype):
    momentum = {} if cls is ScaledAdamW else {"momentum": 0.5}
    pairs = make_pairs(dtype=dtype, zero_B=True)
    start = copies(pairs)
    optimizer = cls([pair_group(pairs)], lr=5e-2, weight_decay=0.0, **momentum, **options)
    wanted = targets(pairs)
    first = quadratic_gradients(pairs, wanted)
    for step in range(12):
        quadratic_gradients(pairs, wanted)
        optimizer.step()
        if step == 0:
            assert all(torch.equal(A, A0) for (A, _), (A0, _) in zip(pairs, start, strict=True))
        assert all(p.isfinite().all() for pair in pairs for p in pair)
    last = quadratic_gradients(pairs, wanted)
    assert sum(g.float().square().sum() for g in last) < 0.97 * sum(g.float().square().sum() for g in first)


@pytest.mark.parametrize("options", COMBINATIONS, ids=label)
@pytest.mark.parametrize("cls", [ScaledAdamW, ScaledGD])
def test_one_pair_at_a_time_gives_the_same(cls, options):
    momentum = {} if cls is ScaledAdamW else {"momentum": 0.5}
    together, alone = make_pairs(), make_pairs()
    expected = train(together, cls([pair_group(together)], **momentum, **options), 3)
    found = []
    for pair, W in zip(alone, targets(alone), strict=True):
        optimizer = cls([pair_group([pair])], **momentum, **options)
        for _ in range(3):
            quadratic_gradients([pair], [W])
            optimizer.step()
        found.append((pair[1] @ pair[0]).detach())
    assert relative_distance(found, expected) < 1e-9


FULL = [
    {"variant": "split", "transport_momentum": True, "scale_correction": True},
    {"damping_mode": "absolute", "order": "gauss_seidel"},
]


@pytest.mark.parametrize("options", FULL, ids=label)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_the_uninterrupted_one(options, dtype):
    pairs = make_pairs(dtype=dtype)
    first = ScaledAdamW([pair_group(pairs)], lr=1e-2, **options)
    train(pairs, first, 2)
    other = [tuple(nn.Parameter(p.detach().clone()) for p in pair) for pair in pairs]
    second = ScaledAdamW([pair_group(other)], lr=1e-2, **options)
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # torch's too takes tensors over as they are
    for x, y in zip(train(pairs, first, 2), train(other, second, 2), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("options", FULL, ids=label)
def test_rates_may_be_tensors_and_differ_between_the_factors(options):
    steps = []
    for lr, ratio in ((1e-2, 1.0), (torch.tensor(1e-2), 1.0), (1e-2, 3.0)):
        pairs = make_pairs()
        before = copies(pairs)
        optimizer = ScaledAdamW([pair_group(pairs, lr_ratio_B=ratio)], lr=lr, weight_decay=0.0, **options)
        train(pairs, optimizer, 1)
        steps.append([(A - a, B - b) for (A, B), (a, b) in zip(pairs, before, strict=True)])
    for (A, B), (tensor_A, tensor_B), (ratio_A, ratio_B) in zip(*steps, strict=True):
        torch.testing.assert_close((tensor_A, tensor_B), (A, B), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(ratio_A, A)
        if options.get("order") != "gauss_seidel":
            torch.testing.assert_close(ratio_B, 3 * B)


@pytest.mark.parametrize("options", FULL, ids=label)
def test_maximize_is_the_negated_gradient(options):
    down, up = make_pairs(), make_pairs()
    for pairs, sign in ((down, 1), (up, -1)):
        optimizer = ScaledAdamW([pair_group(pairs)], lr=1e-2, maximize=sign < 0, **options)
        for _ in range(2):
            quadratic_gradients(pairs, targets(pairs))
            for pair in pairs:
                for p in pair:
                    p.grad.mul_(sign)
            optimizer.step()
    for x, y in zip(down, up, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("options", FULL, ids=label)
def test_factors_without_gradient_stay(options):
    pairs = make_pairs()
    optimizer = ScaledAdamW([pair_group(pairs)], lr=1e-2, **options)
    before = copies(pairs)
    for _ in range(2):
        quadratic_gradients(pairs, targets(pairs))
        pairs[0][0].grad = None
        pairs[1][0].grad = pairs[1][1].grad = None
        optimizer.step()
    still = [pairs[0][0], *pairs[1]]
    for p, old in zip(still, (before[0][0], *before[1]), strict=True):
        assert torch.equal(p, old)
    assert not torch.equal(pairs[0][1], before[0][1]) and not torch.equal(pairs[2][0], before[2][0])
