"""What the methods have in common that make all singular values of a step one size: LoRA-Muon and LoRA-TSD."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dreamlora.optimizers import LoRAMuon, LoRARITE, LoRATSD
from tests.optimizers.lora_problems import (
    descend,
    make_pairs,
    pair_group,
    quadratic_gradients,
    relative_distance,
    targets,
    values,
)

METHODS = pytest.mark.parametrize("cls", [LoRAMuon, LoRATSD])


@dataclass(frozen=True)
class OfOneFactor:
    """By how much ``BA`` changes, as a part of lr, where one factor is zero and the other alone can move.

    Attributes:
        tolerance: relative, of float32.
    """

    cls: type
    part: float
    tolerance: float


SIZES = pytest.mark.parametrize("method", [OfOneFactor(LoRAMuon, 0.5, 4e-3), OfOneFactor(LoRATSD, 1.0, 1e-5)])


@METHODS
def test_without_gradients_the_product_decays_as_said(cls):
    pairs = make_pairs()
    before = [(B @ A).detach() for A, B in pairs]
    for pair in pairs:
        for p in pair:
            p.grad = torch.zeros_like(p)
    cls([pair_group(pairs)], lr=0.1, weight_decay=2.0).step()
    assert relative_distance([(B @ A).detach() for A, B in pairs], [0.8 * x for x in before]) < 1e-12


@METHODS
def test_a_decay_that_would_turn_the_weights_round_is_refused(cls):
    with pytest.raises(ValueError, match="weight_decay: got lr"):
        cls([pair_group(make_pairs())], lr=1.0, weight_decay=1.0)


@SIZES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_start_at_zero_moves_B_then_both(method, dtype):
    pairs = make_pairs(dtype=dtype, zero_B=True)
    start = values(pairs)
    optimizer = method.cls([pair_group(pairs)], lr=0.05, rank_power=0.0, layer_power=0.0)
    descend(pairs, optimizer, 1)
    moved = [not torch.equal(x, y) for x, y in zip(values(pairs), start, strict=True)]
    assert moved == [False, True] * len(pairs)
    assert_flat(pairs, 0.05 * method.part, 3e-2 if dtype == torch.bfloat16 else method.tolerance)
    descend(pairs, optimizer, 5)
    assert all(p.isfinite().all() for pair in pairs for p in pair)
    assert all(not torch.equal(x, y) for x, y in zip(values(pairs), start, strict=True))


@SIZES
def test_a_zero_A_is_free_to_move(method):
    pairs = make_pairs()
    for A, _ in pairs:
        A.data.zero_()
    quadratic_gradients(pairs, targets(pairs))
    method.cls([pair_group(pairs)], lr=0.1, momentum=0.0, rank_power=0.0, layer_power=0.0).step()
    assert_flat(pairs, 0.1 * method.part, 1e-5)


@pytest.mark.parametrize("cls", [LoRAMuon, LoRATSD, LoRARITE])
def test_a_negative_scaling_goes_downhill_too(cls):
    pairs = make_pairs()
    optimizer = cls([pair_group(pairs, scalings=[-2.0] * 4)], lr=1e-2)
    wanted = targets(pairs)
    before = sum(float(G.norm()) for G in quadratic_gradients(pairs, wanted, -2.0))
    for _ in range(5):
        optimizer.step()
        after = sum(float(G.norm()) for G in quadratic_gradients(pairs, wanted, -2.0))
    assert after < before


@pytest.mark.parametrize("cls", [LoRAMuon, LoRATSD, LoRARITE])
@pytest.mark.parametrize("trust", [0.0, 0.02])
def test_steps_get_shorter_with_the_number_of_pairs(cls, trust):
    """``(pairs/64)^-layer_power``, with the pairs of all groups; the bound of the step of A goes by it as well."""

    def step_of_the_first(groups: int, lr: float, power: float) -> list[Tensor]:
        each = [make_pairs() for _ in range(groups)]
        for pairs in each:
            quadratic_gradients(pairs, targets(pairs))
        # the norm by which RITE clips is of all pairs
        bound = {"clip_unmagnified_grad": 0.0} if cls is LoRARITE else {"momentum": 0.0}
        cls([pair_group(pairs) for pairs in each], lr=lr, layer_power=power, trust=trust, **bound).step()
        return [x - y for x, y in zip(values(each[0]), values(make_pairs()), strict=True)]

    count = len(make_pairs())
    for groups, power in ((1, 0.5), (3, 0.5), (3, 1.0)):
        found = step_of_the_first(groups, 0.1, power)
        expected = step_of_the_first(1, 0.1 * (64 / (count * groups)) ** power, 0.0)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("cls", [LoRAMuon, LoRATSD, LoRARITE])
def test_a_state_from_before_steps_knew_the_number_of_pairs_goes_on_as_it_was(cls):
    pairs = make_pairs()
    optimizer = cls([pair_group(pairs)], lr=1e-2, layer_power=0.0)
    descend(pairs, optimizer, 1)
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        del group["layer_power"]
    later = cls([pair_group(pairs)], lr=1e-2, layer_power=0.5)
    later.load_state_dict(saved)
    assert [group["layer_power"] for group in later.param_groups] == [0.0]


@METHODS
def test_maximize_takes_the_opposite_step(cls):
    steps = []
    for maximize in (False, True):
        pairs = make_pairs()
        before = values(pairs)
        quadratic_gradients(pairs, targets(pairs))
        cls([pair_group(pairs)], lr=1e-2, maximize=maximize).step()
        steps.append([x - y for x, y in zip(values(pairs), before, strict=True)])
    for down, up in zip(*steps, strict=True):
        torch.testing.assert_close(down, -up)


def assert_flat(pairs, size, tolerance):
    """All singular values of every ``BA`` are ``size``."""
    for A, B in pairs:
        S = torch.linalg.svdvals((B @ A).detach().double())[: len(A)]
        torch.testing.assert_close(S, torch.full_like(S, size), rtol=tolerance, atol=0)
