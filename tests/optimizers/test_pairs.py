"""The optimizer as others use it: groups, state, schedulers, scalers, accelerate, refusals."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from dreamlora.optimizers import LoRAMuon, LoRARITE, LoRATSD, ScaledAdamW, ScaledGD
from tests.optimizers.lora_problems import descend, make_pairs, pair_group, quadratic_gradients, targets, values

KINDS = [
    (ScaledAdamW, {"lr": 0.01}),
    (ScaledGD, {"lr": 0.1, "momentum": 0.9}),
    (LoRARITE, {"lr": 0.01, "clip_unmagnified_grad": 0.0}),
    (LoRAMuon, {"lr": 0.05}),
    (LoRATSD, {"lr": 0.05}),
]
kinds = pytest.mark.parametrize(("cls", "settings"), KINDS, ids=["adamw", "gd", "rite", "muon", "tsd"])


def same(found, expected) -> bool:
    return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def saved(optimizer) -> dict:
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# ---------------------------------------------------------------- state


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(cls, settings, dtype):
    pairs = make_pairs(dtype=dtype)
    first = cls([pair_group(pairs)], **settings)
    descend(pairs, first, 3)
    resumed = [(nn.Parameter(A.detach().clone()), nn.Parameter(B.detach().clone())) for A, B in pairs]
    second = cls([pair_group(resumed)], **settings)
    second.load_state_dict(saved(first))
    descend(pairs, first, 3)
    descend(resumed, second, 3)
    assert same(values(resumed), values(pairs))


def test_moments_of_bfloat16_parameters_are_float32_also_after_loading():
    pairs = make_pairs(dtype=torch.bfloat16)
    optimizer = ScaledAdamW([pair_group(pairs)])
    descend(pairs, optimizer, 2)
    other = ScaledAdamW([pair_group(make_pairs(dtype=torch.bfloat16))])
    other.load_state_dict(saved(optimizer))
    for mine, theirs in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert theirs["exp_avg"].dtype == theirs["exp_avg_sq"].dtype == theirs["step"].dtype == torch.float32
        assert torch.equal(mine["exp_avg"], theirs["exp_avg"])


def test_bfloat16_parameters_take_the_float32_step_rounded():
    low = make_pairs(dtype=torch.bfloat16)
    high = [(nn.Parameter(A.detach().float()), nn.Parameter(B.detach().float())) for A, B in low]
    for pairs in (low, high):
        for A, B in pairs:
            A.grad, B.grad = torch.ones_like(A), torch.full_like(B, -0.5)
        ScaledAdamW([pair_group(pairs)], lr=0.1).step()
    assert same(values(low), [p.bfloat16() for p in values(high)])


@kinds
def test_copies_train_alike(cls, settings):
    pairs = make_pairs()
    optimizer = cls([pair_group(pairs)], **settings)
    descend(pairs, optimizer, 2)
    pairs2, optimizer2 = copy.deepcopy((pairs, optimizer))
    pairs3, optimizer3 = pickle.loads(pickle.dumps((pairs, optimizer)))
    for p, o in ((pairs, optimizer), (pairs2, optimizer2), (pairs3, optimizer3)):
        descend(p, o, 2)
    assert same(values(pairs2), values(pairs)) and same(values(pairs3), values(pairs))


def test_a_group_added_later_is_trained():
    pairs, more = make_pairs(seed=0), make_pairs(seed=1)
    optimizer = ScaledAdamW([pair_group(pairs)], lr=0.01)
    descend(pairs, optimizer, 1)
    optimizer.add_param_group(pair_group(more))
    before = values(more)
    descend(more, optimizer, 1)
    assert not any(torch.equal(x, y) for x, y in zip(values(more), before, strict=True))


# ---------------------------------------------------------------- fallback, gradients, closures


def test_parameters_outside_pairs_get_torchs_adamw():
    ours, theirs = (nn.Parameter(torch.arange(6.0)) for _ in range(2))
    pairs = make_pairs()
    settings = {"lr": 0.03, "betas": (0.7, 0.9), "eps": 1e-4, "weight_decay": 0.2}
    mine = ScaledAdamW([pair_group(pairs), {"params": [ours], "lora_pairs": False}], **settings)
    reference = torch.optim.AdamW([theirs], **settings)
    for step in range(4):
        ours.grad = torch.sin(torch.arange(6.0) + step)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs)


@kinds
def test_factors_without_gradient_stay_and_the_others_step_as_always(cls, settings):
    pairs, full = make_pairs(), make_pairs()
    for each in (pairs, full):
        quadratic_gradients(each, targets(each))
    pairs[0][0].grad = None  # one factor
    pairs[1][0].grad = pairs[1][1].grad = None  # a whole pair
    before = values(pairs)
    cls([pair_group(pairs)], **settings).step()
    cls([pair_group(full)], **settings).step()
    for i, (now, old, other) in enumerate(zip(values(pairs), before, values(full), strict=True)):
        if i == 1 and cls is LoRATSD:  # its step is of both factors together
            assert not torch.allclose(now, old)
            continue
        torch.testing.assert_close(now, old if i in (0, 2, 3) else other, rtol=1e-12, atol=0)


@kinds
def test_step_leaves_gradients_alone(cls, settings):
    pairs = make_pairs()
    quadratic_gradients(pairs, targets(pairs))
    before = [p.grad.clone() for pair in pairs for p in pair]
    cls([pair_group(pairs)], **settings).step()
    assert same([p.grad for pair in pairs for p in pair], before)


@kinds
def test_a_closure_is_run_once_with_gradients_before_they_are_read(cls, settings):
    pairs, plain = make_pairs(), make_pairs()
    optimizer = cls([pair_group(pairs)], **settings)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        quadratic_gradients(pairs, targets(pairs))
        return 7.0

    assert optimizer.step(closure) == 7.0
    descend(plain, cls([pair_group(plain)], **settings), 1)
    assert calls == [True] and same(values(pairs), values(plain))


def test_sparse_gradients_are_refused():
    pairs = make_pairs(((4, 5, 2),), dtype=torch.float32)
    pairs[0][0].grad = torch.zeros(2, 5).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        ScaledAdamW([pair_group(pairs)]).step()


# ---------------------------------------------------------------- learning rates, scalers, accelerate


@kinds
def test_schedulers_and_tensor_rates_act(cls, settings):
    lr = settings["lr"]
    steps = []
    for rate in (lr, torch.tensor(lr)):
        pairs = make_pairs()
        optimizer = cls([pair_group(pairs, lr_ratio_B=2.0)], **{**settings, "lr": rate}, weight_decay=0.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 1 else 0.0)
        descend(pairs, optimizer, 1)
        scheduler.step()
        after_one = values(pairs)
        descend(pairs, optimizer, 1)
        assert same(values(pairs), after_one)
        steps.append(after_one)
    for x, y in zip(*steps, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("overflow", [True, False])
def test_grad_scaler_unscales_and_skips(overflow):
    pairs, plain = make_pairs(dtype=torch.float32), make_pairs(dtype=torch.float32)
    optimizer = ScaledAdamW([pair_group(pairs)], lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    loss = sum((B @ A - W).square().sum() / 2 for (A, B), W in zip(pairs, targets(pairs), strict=True))
    scaler.scale(loss).backward()
    if overflow:
        pairs[0][0].grad[0, 0] = float("inf")
    scaler.step(optimizer)
    scaler.update()
    if not overflow:
        descend(plain, ScaledAdamW([pair_group(plain)], lr=0.01), 1)
    for x, y in zip(values(pairs), values(plain), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_accelerate_prepares_steps_and_resumes(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    pairs, plain = make_pairs(dtype=torch.float32), make_pairs(dtype=torch.float32)
    descend(plain, ScaledAdamW([pair_group(plain)], lr=0.01), 4)
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = accelerator.prepare(ScaledAdamW([pair_group(pairs)], lr=0.01))
    descend(pairs, optimizer, 2)
    state = copy.deepcopy(optimizer.state_dict())
    fresh = accelerator.prepare(ScaledAdamW([pair_group(pairs)], lr=0.01))
    fresh.load_state_dict(state)
    descend(pairs, fresh, 2)
    assert same(values(pairs), values(plain))


def test_autocast_does_not_reach_the_step():
    pairs, plain = make_pairs(dtype=torch.float32), make_pairs(dtype=torch.float32)
    for each in (pairs, plain):
        quadratic_gradients(each, targets(each))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ScaledGD([pair_group(pairs)]).step()
    ScaledGD([pair_group(plain)]).step()
    assert same(values(pairs), values(plain))


# ---------------------------------------------------------------- refusals


def flat_like_zero():
    return pair_group([(nn.Parameter(torch.zeros(40)), nn.Parameter(torch.zeros(40)))])


def odd():
    group = pair_group(make_pairs())
    group["params"].pop()
    return group


def swapped():
    return pair_group([(B, A) for A, B in make_pairs()])


def tied():
    pairs = make_pairs(((4, 4, 2), (4, 4, 2)))
    return pair_group([pairs[0], (pairs[0][0], pairs[1][1])])


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (flat_like_zero, "flatten"),
        (odd, "A1, B1"),
        (swapped, "do not multiply"),
        (tied, "more than one LoRA pair"),
        (lambda: pair_group(make_pairs(), scalings=[1.0]), "scalings"),
        (lambda: {"params": [nn.Parameter(torch.zeros(3))], "lora_pairs": False}, "lora_param_groups"),
        (lambda: {"params": [nn.Parameter(torch.zeros(3))]}, "lora_param_groups"),
        (lambda: pair_group([(nn.Parameter(torch.zeros(2, 8)[:, ::2]), nn.Parameter(torch.zeros(3, 2)))]), "gaps"),
    ],
)
def test_groups_that_are_no_pairs_are_refused(group, message):
    with pytest.raises(ValueError, match=message):
        ScaledAdamW([group()])


def test_a_list_of_parameters_is_refused():
    with pytest.raises(ValueError, match="lora_param_groups"):
        ScaledAdamW([p for pair in make_pairs() for p in pair])


def test_sharded_factors_are_refused_with_advice():
    class Sharded(nn.Parameter):
        device_mesh = "as DTensor has"

    with pytest.raises(ValueError, match="ignored_params"):
        ScaledAdamW([pair_group([(Sharded(torch.zeros(2, 4)), Sharded(torch.zeros(3, 2)))])])


def test_parameters_flattened_after_construction_are_refused_at_the_step():
    pairs = make_pairs()
    optimizer = ScaledAdamW([pair_group(pairs)])
    descend(pairs, optimizer, 1)
    flat = nn.Parameter(torch.cat([p.detach().flatten() for pair in pairs for p in pair]))
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]  # what DeepSpeed does
    with pytest.raises(ValueError, match="ZeRO"):
        optimizer.step()


def test_the_callers_groups_are_not_changed():
    group = pair_group(make_pairs())
    ScaledAdamW([group])
    assert set(group) == {"params", "lora_pairs"}
