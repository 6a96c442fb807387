"""Health against dense matrices; what it must not depend on."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from dreamlora.lora.health import TOTAL, measure, snapshots, update_rms
from dreamlora.lora.pairs import AdaptedLayer
from tests.fakemps import FakeMps
from tests.inits.problems import SCALE, on_device, problem


def layer(group: str, m: int, n: int, *, rank: int = 3, scaling: float = 1.5, seed: int = 0) -> AdaptedLayer:
    draw = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, n, generator=draw), torch.randn(m, rank, generator=draw)
    return of(group, A, B, scaling)


def of(group: str, A: torch.Tensor, B: torch.Tensor, scaling: float) -> AdaptedLayer:
    return AdaptedLayer(f"{group}.0.to_q", A, B, scaling, start=None, layer=None)


def dense(layer: AdaptedLayer) -> torch.Tensor:
    return layer.scaling * (layer.B.double() @ layer.A.double())


LAYERS = [layer("a", 7, 5), layer("b", 7, 5, seed=1, scaling=0.5), layer("b", 4, 9, seed=2), layer("a", 7, 5, seed=3)]


@pytest.mark.parametrize(("group", "members"), [(TOTAL, [0, 1, 2, 3]), ("a", [0, 3]), ("b", [1, 2])])
def test_groups_equal_dense_matrices(group, members):
    found = measure(LAYERS)[group]
    matrices = [dense(LAYERS[i]) for i in members]
    assert found.dw_norm == pytest.approx(math.sqrt(sum(float(W.square().sum()) for W in matrices)))
    ranks = [float(W.square().sum() / torch.linalg.svdvals(W)[0] ** 2) for W in matrices]
    assert found.stable_rank == pytest.approx(sum(ranks) / len(ranks))
    balances = []
    for i in members:
        KA, KB = LAYERS[i].A @ LAYERS[i].A.mT, LAYERS[i].B.mT @ LAYERS[i].B
        balances.append(1 - float((KA - KB).norm() / (KA.norm() + KB.norm())))
    assert found.balance == pytest.approx(sum(balances) / len(balances))


def test_only_the_balance_depends_on_the_gauge():
    first = LAYERS[0]
    R = torch.randn(3, 3, generator=torch.Generator().manual_seed(9)) + 3 * torch.eye(3)
    A, B = torch.linalg.solve(R, first.A), first.B @ R
    one, other = measure([first])[TOTAL], measure([of("a", A, B, first.scaling)])[TOTAL]
    assert other.dw_norm == pytest.approx(one.dw_norm, rel=1e-5)
    assert other.stable_rank == pytest.approx(one.stable_rank, rel=1e-5)
    assert abs(other.balance - one.balance) > 0.05


def test_special_cases():
    A = torch.eye(3, 5)
    zero = measure([of("a", A, torch.zeros(7, 3), 1.0)])[TOTAL]
    assert (zero.dw_norm, zero.stable_rank, zero.balance) == (0, None, 0)
    even = measure([of("a", A, torch.eye(7, 3), 2.0)])[TOTAL]
    assert even.dw_norm == pytest.approx(2 * math.sqrt(3))
    assert (even.stable_rank, even.balance) == (pytest.approx(3), pytest.approx(1))


def test_a_frozen_start_does_not_count():
    made = problem()
    made.start("pissa")
    layers = snapshots({"": made.net})
    assert measure(layers)[TOTAL].dw_norm == 0
    assert measure(layers)[TOTAL].balance == pytest.approx(1, abs=1e-4)  # PiSSA divides the root evenly
    for target in made.targets:
        target.B.data += 0.1
    after = snapshots({"": made.net})
    total = math.sqrt(sum(float(change.square().sum()) for change in made.change()))
    assert measure(after)[TOTAL].dw_norm == pytest.approx(total, rel=1e-5)
    entries = sum(change.numel() for change in made.change())
    assert update_rms(layers, after)[TOTAL] == pytest.approx(total / math.sqrt(entries), rel=1e-5)


def test_the_update_is_that_of_the_weight():
    # both factors at once: the product of the changes counts too
    after = [replace(x, A=x.A + 0.1, B=1.1 * x.B) for x in LAYERS]
    found = update_rms(LAYERS, after)
    for group, members in ((TOTAL, [0, 1, 2, 3]), ("a", [0, 3]), ("b", [1, 2])):
        changes = torch.cat([(dense(after[i]) - dense(LAYERS[i])).flatten() for i in members])
        assert found[group] == pytest.approx(float(changes.square().mean().sqrt()))


def test_groups_are_blocks_of_the_denoiser_and_whole_text_encoders():
    first, second = problem(), problem()
    layers = snapshots({"": first.net, "text_encoder": second.net})
    names = ["conv", "square", "out"]
    assert [layer.name for layer in layers] == [*names, *(f"text_encoder.{name}" for name in names)]
    assert layers[0].A.shape == (2, 27) and layers[0].scaling == SCALE
    assert list(measure(layers)) == [TOTAL, "conv", "square", "out", "text_encoder"]
    assert list(measure(layers[:1])) == [TOTAL]


def test_snapshots_are_copies():
    made = problem()
    [first, *_] = snapshots({"": made.net})
    before = first.A.clone()
    made.targets[0].A.data += 1
    assert torch.equal(first.A, before)


@pytest.mark.parametrize("init", ["gaussian", "pissa"])
def test_it_is_measured_on_the_cpu(init):
    """Apple's GPUs have no float64; and no GPU should give memory for it."""
    here = problem()
    here.start(init)
    for target in here.targets:
        target.B.data += 0.1
    with FakeMps():
        there = on_device(here)
        layers = snapshots({"": there.net})
        tensors = [x for layer in layers for x in (layer.A, layer.B, *layer.factors())]
        assert {x.device.type for x in tensors} == {"cpu"}
        assert measure(layers) == measure(snapshots({"": here.net}))
        assert update_rms(layers, layers)[TOTAL] == 0
