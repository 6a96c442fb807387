"""Matrices that serve for several steps: as blind to the factorisation as new ones, and a resumed run has the same."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dreamlora.optimizers import LoRAMuon, LoRARITE, ScaledAdamW
from dreamlora.optimizers._kernels import without_tf32
from dreamlora.optimizers._rank_space import RankSpace
from tests.optimizers.lora_problems import (
    Pairs,
    cast,
    descend,
    general,
    make_pairs,
    pair_group,
    quadratic_gradients,
    regauge,
    relative_distance,
    targets,
)

METHODS = {"lora_muon": (LoRAMuon, 5e-2), "lora_rite": (LoRARITE, 1e-2)}
methods = pytest.mark.parametrize("method", METHODS)
STEPS = 30  # the first 20 make matrices anew each


def fit(pairs: Pairs, optimizer: torch.optim.Optimizer, directions: int) -> list[list[Tensor]]:
    """Learn ``BA X = W X``, with a new X of few columns in every step; the products after every step."""
    generator = torch.Generator().manual_seed(1)
    products = []
    wanted = targets(pairs)
    for _ in range(STEPS):
        for (A, B), W in zip(pairs, wanted, strict=True):
            X = torch.randn(A.shape[1], directions, generator=generator, dtype=torch.float64)
            a, b = A.detach().double(), B.detach().double()
            G = (b @ a - W) @ X @ X.T / directions
            A.grad, B.grad = (b.T @ G).to(A.dtype), (G @ a.T).to(B.dtype)
        optimizer.step()
        products.append([(B.detach().double() @ A.detach().double()) for A, B in pairs])
    return products


@methods
@pytest.mark.parametrize("zero_B", [False, True], ids=["B", "B=0"])
@pytest.mark.parametrize("directions", [20, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kept_matrices_do_not_see_the_factorisation(method, zero_B, directions, dtype):
    """From B = 0 with few directions some are a hundredth of the others, which magnifies the rounding of a Gram matrix.

    The ranks are those for which ``general`` has a condition below 15: the start itself is rounded so much.
    """
    make, lr = METHODS[method]
    pairs = make_pairs(((30, 20, 8), (30, 20, 8), (24, 28, 3)), zero_B=zero_B)
    paths = []
    for each in (regauge(pairs, general), pairs):
        each = cast(each, dtype)
        paths.append(fit(each, make([pair_group(each)], lr=lr, weight_decay=0.1), directions))
    worst = max(relative_distance(found, expected) for found, expected in zip(*paths, strict=True))
    assert worst < (1e-9 if dtype == torch.float64 else 1e-5) * (10 if zero_B and directions <= 8 else 1)


@methods
def test_matrices_are_made_anew_when_they_are_due(method, monkeypatch):
    make, lr = METHODS[method]
    calls = []
    original = RankSpace.coordinates
    monkeypatch.setattr(RankSpace, "coordinates", lambda self: calls.append(None) or original(self))
    numbers = {}
    for refresh in (1, 4):
        pairs = make_pairs(((10, 7, 3),))
        optimizer = make([pair_group(pairs)], lr=lr, refresh=refresh)
        calls.clear()
        descend(pairs, optimizer, 29)
        numbers[refresh] = len(calls)
    assert numbers == {1: 29, 4: 20 + 3}  # after 20, 24 and 28 steps


@methods
@pytest.mark.parametrize("jump", range(24, 28))
def test_a_rate_that_jumps_up_takes_no_step_that_was_bounded_for_a_lower_one(method, jump):
    """As at a restart of a schedule: ``trust`` bounds a step of A where B is short beside a step."""
    pairs = make_pairs(((10, 7, 3),))
    ((A, B),) = pairs
    B.data[:, 2] *= 1e-4
    optimizer = METHODS[method][0]([pair_group(pairs)], lr=1e-12)
    descend(pairs, optimizer, jump)
    optimizer.param_groups[0]["lr"] = 0.1
    before = A.detach().clone()
    descend(pairs, optimizer, 1)
    values, vectors = torch.linalg.eigh(before @ before.T)
    whitened = vectors @ torch.diag(values.rsqrt()) @ vectors.T @ (A.detach() - before)
    assert torch.linalg.matrix_norm(whitened, 2) <= (0.1 if method == "lora_muon" else 1.0)


@methods
@pytest.mark.parametrize("steps", [19, 20, 21, 22, 23, 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_that_stops_between_goes_on_bit_for_bit(method, steps, dtype):
    make, lr = METHODS[method]
    pairs = make_pairs(dtype=dtype, zero_B=True)
    first = make([pair_group(pairs)], lr=lr)
    descend(pairs, first, steps)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    resumed = copy.deepcopy(pairs)
    second = make([pair_group(resumed)], lr=lr)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    descend(pairs, first, 6)
    descend(resumed, second, 6)
    for (A, B), (a, b) in zip(pairs, resumed, strict=True):
        assert torch.equal(A, a) and torch.equal(B, b)


@methods
def test_pairs_whose_gradients_come_late_or_now_and_then_step_too(method):
    make, lr = METHODS[method]
    pairs = make_pairs(((10, 7, 3), (10, 7, 3)))
    optimizer = make([pair_group(pairs)], lr=lr)
    for step in range(30):
        quadratic_gradients(pairs, targets(pairs))
        present = step in (22, 26, 27)
        if not present:
            pairs[0][0].grad = pairs[0][1].grad = None
        before = [p.detach().clone() for p in pairs[0]]
        optimizer.step()
        moved = [not torch.equal(p, q) for p, q in zip(pairs[0], before, strict=True)]
        assert moved == [present, present]


def test_after_a_gap_matrices_are_those_of_the_factors_as_they_are():
    """A pair that was away is not stepped with matrices of factors that somebody else has changed meanwhile."""
    products = []
    for change in (1.0, 3.0):
        pairs = make_pairs(((10, 7, 3), (10, 7, 3)))
        optimizer = LoRAMuon([pair_group(pairs)], lr=5e-2)
        descend(pairs, optimizer, 22)
        quadratic_gradients(pairs, targets(pairs))
        pairs[0][0].grad = pairs[0][1].grad = None
        optimizer.step()
        A, B = pairs[0]
        A.data, B.data = A.data * change, B.data / change
        optimizer.state[A]["momentum_buffer"].mul_(1 / change)
        optimizer.state[B]["momentum_buffer"].mul_(change)
        descend(pairs, optimizer, 1)
        products.append([(B @ A).detach() for A, B in pairs])
    assert relative_distance(*products) < 1e-9


@methods
def test_what_cannot_be_factored_is_left_out_and_counted(method):
    make, lr = METHODS[method]
    pairs = make_pairs(((10, 7, 3), (10, 7, 3)))
    pairs[0][1].data.fill_(1e200)  # its Gram matrix is infinite
    optimizer = make([pair_group(pairs)], lr=lr)
    before = [p.detach().clone() for pair in pairs for p in pair]
    for steps in (1, 2):
        for pair in pairs:
            for p in pair:
                p.grad = torch.ones_like(p)
        optimizer.step()
        assert optimizer.stats["fallbacks"] == steps
    moved = [not torch.equal(p, q) for p, q in zip([p for pair in pairs for p in pair], before, strict=True)]
    assert moved[0] is False and moved[2:] == [True, True]
    assert all(p.isfinite().all() for pair in pairs for p in pair)


@methods
@pytest.mark.parametrize("value", [0, -1, 2.5, True])
def test_refresh_is_a_whole_number(method, value):
    make, _ = METHODS[method]
    with pytest.raises(ValueError, match=rf"refresh: got {value}, must be a whole number >= 1"):
        make([pair_group(make_pairs())], refresh=value)


class Waiting(TorchDispatchMode):
    """Notes what would wait for a GPU: a number, or a size, that the host has to know."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.__name__.split(".")[0] in ("_local_scalar_dense", "nonzero", "equal", "_linalg_eigh", "index"):
            self.seen.append(function.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", [*METHODS, "split"])
def test_no_step_waits_for_a_gpu(kind):
    pairs = make_pairs(dtype=torch.float32)
    groups = [pair_group(pairs)]
    optimizer = ScaledAdamW(groups, variant="split") if kind == "split" else METHODS[kind][0](groups)
    descend(pairs, optimizer, 19)
    waiting = Waiting()
    for _ in range(6):
        quadratic_gradients(pairs, targets(pairs))
        with waiting:
            optimizer.step()
    assert not waiting.seen
    with waiting:
        assert torch.equal(torch.ones(1), torch.ones(1)) and float(torch.ones(())) == 1
    assert waiting.seen  # it does see it


@pytest.mark.parametrize("setting", ["allow_tf32", "fp32_precision"])
def test_no_product_is_of_tf32_whatever_the_program_allows(setting):
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, setting):
        pytest.skip("this torch has no such setting")
    allowed, full = (True, False) if setting == "allow_tf32" else ("tf32", "ieee")
    before = getattr(matmul, setting)
    try:  # monkeypatch would delete it afterwards: torch answers for it without having it
        setattr(matmul, setting, allowed)
        with without_tf32():
            assert getattr(matmul, setting) == full
        assert getattr(matmul, setting) == allowed
    finally:
        setattr(matmul, setting, before)
