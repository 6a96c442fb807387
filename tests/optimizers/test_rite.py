"""LoRA-RITE: equal to the library's implementation, blind to the factorisation, half the state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dreamlora.optimizers import LoRARITE
from dreamlora.optimizers._batch import PairBatch
from dreamlora.optimizers._rank_space import RankSpace
from dreamlora.optimizers._rite import corrected_decay, escaping
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

LIBRARY = [
    {},
    {"clip_unmagnified_grad": 0.0, "weight_decay": 0.1},
    {"betas": (0.8, 0.9), "eps": 1e-3, "update_skipping": 2.0},
    {"apply_escape": True, "update_capping": 0.5, "betas": (0.7, 0.8)},
    {"maximize": True, "weight_decay": 0.1},
]


@pytest.mark.parametrize("zero_B", [True, False], ids=["B=0", "B"])
@pytest.mark.parametrize("settings", LIBRARY, ids=["defaults", "decay", "skipping", "escape", "maximize"])
def test_equals_the_library_step_by_step(settings, zero_B):
    library = pytest.importorskip("pytorch_optimizer", reason="the library's LoRA-RITE is the reference")
    settings = {"lr": 0.05, "update_skipping": 0.0, **settings}
    ours, theirs = make_pairs(zero_B=zero_B), make_pairs(zero_B=zero_B)
    wanted = targets(ours)
    mine = LoRARITE([pair_group(ours)], **settings, trust=0.0)
    # The library takes [left, right] with the rank first and last: m×r factors come as their transpose.
    swapped = [nn.Parameter(p.detach().clone()) for A, B in theirs for p in (A, B)]
    reference = library.LoRARite(swapped, **settings, lora_l_dim=0, lora_r_dim=-1)
    theirs = list(zip(swapped[0::2], swapped[1::2], strict=True))
    for step in range(15):
        for pairs, optimizer in ((ours, mine), (theirs, reference)):
            quadratic_gradients(pairs, wanted)
            optimizer.step()
        for found, expected in zip(values(ours), values(theirs), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9, msg=lambda m, s=step: f"step {s}: {m}")


def train_clipped(pairs, optimizer, steps, clip) -> list[Tensor]:
    """Quadratic training whose targets drift, so that bases and moments keep turning."""
    for step in range(steps):
        quadratic_gradients(pairs, targets(pairs, seed=1 + step // 3))
        optimizer.step()
        assert (optimizer.stats["clipped"] > step) == clip
    return [(B @ A).detach() for A, B in pairs]


@pytest.mark.parametrize(
    "settings",
    [
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "apply_escape": True, "update_capping": 0.5, "scale_correction": True},
        {"trust": 0.01},
    ],
    ids=["momentum, decay, clipping", "escape, capping, scale", "trust"],
)
def test_does_not_see_the_factorisation(settings):
    pairs = make_pairs()
    other = regauge(pairs, general)
    found, expected = (
        train_clipped(
            each, LoRARITE([pair_group(each, scalings=[0.5, 2.0, 1.0, 1.0])], lr=0.05, **settings), 9, clip=True
        )
        for each in (other, pairs)
    )
    start = [(B @ A).detach() for A, B in make_pairs()]
    assert relative_distance(found, expected) < 1e-10
    assert relative_distance(start, expected) > 0.1


def test_state_is_half_of_adamws_and_four_small_matrices():
    pairs = make_pairs(((64, 48, 4),), dtype=torch.float32)
    optimizer = LoRARITE([pair_group(pairs)])
    descend(pairs, optimizer, 2)
    numbers = sum(value.numel() for state in optimizer.state.values() for value in state.values())
    assert numbers == (64 + 48) * 4 + 2 * (4 * 4 * 4 + 2)


def test_clipping_scales_all_pairs_of_all_groups_by_one_norm_and_counts():
    """Ū has the norm of the projected gradient: with V, M and eps switched off the first step is its direction."""
    pairs = make_pairs()
    optimizer = LoRARITE(
        [pair_group(pairs[:2]), pair_group(pairs[2:])], lr=1e9, clip_unmagnified_grad=0.5, eps=1e9, trust=0.0
    )
    before = values(pairs)
    full = quadratic_gradients(pairs, targets(pairs))
    optimizer.step()
    total = 0.0
    for i, G in enumerate(full):
        a, b = before[2 * i], before[2 * i + 1]
        total += float(torch.linalg.qr(b).Q.T.matmul(G).square().sum() + (G @ torch.linalg.qr(a.T).Q).square().sum())
    for i, ((A, _), G) in enumerate(zip(pairs, full, strict=True)):
        a, b = before[2 * i], before[2 * i + 1]
        moved = (a - A.detach()) * 2  # the root of eps² and eps add up
        wanted = torch.linalg.pinv(b) @ G * 0.5 / total**0.5
        torch.testing.assert_close(moved, wanted, rtol=1e-6, atol=1e-7)
    assert optimizer.stats == {"clipped": 1, "skipped": 0, "fallbacks": 0}


def test_skipping_stops_single_factors_and_counts():
    pairs = make_pairs(((6, 5, 2), (6, 5, 2)))
    optimizer = LoRARITE([pair_group(pairs)], lr=0.1, update_skipping=1.0)
    quadratic_gradients(pairs, targets(pairs))
    for p in pairs[0]:
        p.grad.mul_(1e-3)
    pairs[1][0].grad.mul_(1e3)
    pairs[1][1].grad.mul_(1e-3)
    before = values(pairs)
    optimizer.step()
    assert [torch.equal(x, y) for x, y in zip(values(pairs), before, strict=True)] == [False, False, True, False]
    assert optimizer.stats["skipped"] == 1


def test_escaped_mass_by_hand():
    old, P = torch.diag(torch.tensor([4.0, 1.0]))[None], torch.tensor([[[0.5, 0.0], [0.0, 1.0]]])
    assert float(escaping(P @ old @ P.mT, old)) == 3.0  # traces 5 and 2; eigenvalues 4, 1 and 1, 1
    assert float(escaping(old, old)) == 0.0
    assert corrected_decay(0.9, torch.tensor([1.0, 2.0], dtype=torch.float64)).tolist() == pytest.approx(
        [0.0, 0.9 * 0.1 / 0.19]
    )


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 10), (torch.bfloat16, 100), (torch.float64, 10)])
def test_layers_that_see_few_gradient_directions_stay_calm(dtype, limit):
    """A gradient of rank 1 for a LoRA of rank 4: B has three directions that are rounding, and A must not blow up."""
    generator = torch.Generator().manual_seed(0)
    A = nn.Parameter(torch.randn(4, 20, generator=generator).to(dtype))
    B = nn.Parameter(torch.zeros(30, 4, dtype=dtype))
    u, v = torch.randn(30, 1, generator=generator).double(), torch.randn(1, 20, generator=generator).double()
    optimizer = LoRARITE([pair_group([(A, B)])], lr=1e-2)
    for _ in range(30):
        G = (B @ A).detach().double() - u @ v
        G = u @ (u.T @ G @ v.T) @ v / (u.square().sum() * v.square().sum())
        A.grad, B.grad = (B.detach().double().T @ G).to(dtype), (G @ A.detach().double().T).to(dtype)
        optimizer.step()
    assert A.isfinite().all() and float(A.detach().abs().max()) < limit


@pytest.mark.parametrize(("trust", "stable"), [(0.1, True), (0.0, False)])
def test_trust_keeps_a_start_from_zero_finite(trust, stable):
    """Gradients of geometrically falling singular values: B's weak directions are 1e-6 as long as its strong ones."""
    generator = torch.Generator().manual_seed(0)
    A = nn.Parameter(torch.randn(8, 20, generator=generator) / 8)
    B = nn.Parameter(torch.zeros(30, 8))
    U = torch.linalg.qr(torch.randn(30, 8, generator=generator)).Q
    V = torch.linalg.qr(torch.randn(20, 8, generator=generator)).Q
    optimizer = LoRARITE([pair_group([(A, B)])], lr=5e-3, trust=trust)
    for _ in range(40):
        G = U * 10.0 ** -torch.arange(8.0) @ V.T + 1e-4 * torch.randn(30, 20, generator=generator)
        A.grad, B.grad = B.detach().T @ G, G @ A.detach().T
        optimizer.step()
    assert (bool(A.isfinite().all()) and float(A.detach().abs().max()) < 5) == stable


def test_trust_is_what_a_step_changes_where_the_product_is_as_short_as_c():
    """``c = η√n/(2·trust)``: with orthonormal A and ``B = cQ`` the first step changes A by just ``trust``."""
    lr, trust, generator = 1e-3, 0.05, torch.Generator().manual_seed(0)
    Q, rows = (torch.linalg.qr(torch.randn(n, 3, generator=generator, dtype=torch.float64)).Q for n in (9, 7))
    A, B = nn.Parameter(rows.T.clone()), nn.Parameter(lr * 7**0.5 / (2 * trust) * Q)
    A.grad, B.grad = torch.randn(3, 7, generator=generator, dtype=torch.float64), torch.zeros_like(B)
    LoRARITE([pair_group([(A, B)])], lr=lr, trust=trust, eps=1e-12).step()
    changed = torch.linalg.svdvals(A.detach() - rows.T)
    torch.testing.assert_close(changed, torch.full((3,), trust, dtype=torch.float64), rtol=1e-6, atol=0)


def test_resume_from_a_saved_state_is_exact_in_bfloat16():
    import io

    pairs = make_pairs(dtype=torch.bfloat16, zero_B=True)
    first = LoRARITE([pair_group(pairs)], lr=0.05)
    descend(pairs, first, 3)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    other = [(nn.Parameter(A.detach().clone()), nn.Parameter(B.detach().clone())) for A, B in pairs]
    second = LoRARITE([pair_group(other)], lr=0.05)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    descend(pairs, first, 3)
    descend(other, second, 3)
    assert all(torch.equal(x, y) for x, y in zip(values(pairs), values(other), strict=True))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_convolutions_step_like_the_linear_layer_they_are(layout):
    generator = torch.Generator().manual_seed(3)
    A = torch.randn(2, 3, 3, 3, generator=generator, dtype=torch.float64)
    B = torch.randn(5, 2, 1, 1, generator=generator, dtype=torch.float64)
    x = torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64)
    y = torch.randn(2, 5, 6, 6, generator=generator, dtype=torch.float64)
    conv = tuple(nn.Parameter(p.clone(memory_format=layout)) for p in (A, B))
    linear = (nn.Parameter(A.flatten(1).clone()), nn.Parameter(B.flatten(1).clone()))
    for a, b in (conv, linear):
        optimizer = LoRARITE([pair_group([(a, b)])], lr=0.01, weight_decay=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            out = F.conv2d(F.conv2d(x, a, padding=1), b) if a.ndim == 4 else (b @ a @ F.unfold(x, 3, padding=1))
            (out.reshape(y.shape) - y).square().mean().backward()
            optimizer.step()
    for found, expected in zip(conv, linear, strict=True):
        torch.testing.assert_close(found.flatten(1), expected, rtol=1e-9, atol=1e-11)


def test_a_start_at_zero_A_trains_too():
    """The mirror of LoRA's start, as embeddings have it."""
    pairs = [(nn.Parameter(torch.zeros_like(A)), B) for A, B in make_pairs(dtype=torch.float32)]
    start = [B.detach().clone() for _, B in pairs]
    optimizer = LoRARITE([pair_group(pairs)], lr=0.05)
    descend(pairs, optimizer, 1)
    assert all(torch.equal(B, B0) and A.abs().sum() > 0 for (A, B), B0 in zip(pairs, start, strict=True))
    descend(pairs, optimizer, 3)
    assert all(p.isfinite().all() for pair in pairs for p in pair)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_basis_follows_what_the_factors_really_did(dtype):
    """Most of the step is rounded away in bfloat16; the error of a float32 Gram matrix would be magnified by 1e3."""
    A, B = make_pairs(((12, 9, 3),), dtype=dtype)[0]
    B.data = (torch.linalg.qr(B.detach().double()).Q * torch.tensor([1.0, 0.1, 0.01])).to(dtype)
    old = B.detach().double()
    optimizer = LoRARITE([pair_group([(A, B)])], lr=1e-4)
    at = RankSpace(optimizer.param_groups[0], [PairBatch([A], [B], [1.0])], 1).coordinates()
    descend([(A, B)], optimizer, 1)
    expected = B.detach().double().T @ old @ at.whitening[0].T
    torch.testing.assert_close(optimizer.state[A]["basis"], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("trust", [0.0, 0.01])
def test_a_power_of_the_rank_is_a_rate_of_its_own_for_every_rank(trust):
    """The bound of a step included."""
    rank, shapes = 4, ((12, 9, 4), (7, 10, 4))
    pairs, same = make_pairs(shapes), make_pairs(shapes)
    wanted = targets(pairs)
    powered = LoRARITE([pair_group(pairs)], lr=0.1, rank_power=0.5, trust=trust)
    plain = LoRARITE([pair_group(same)], lr=0.1 * rank**-0.5, trust=trust)
    for _ in range(5):
        for each, optimizer in ((pairs, powered), (same, plain)):
            quadratic_gradients(each, wanted)
            optimizer.step()
    for found, expected in zip(values(pairs), values(same), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
