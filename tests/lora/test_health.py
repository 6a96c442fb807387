"""Health against dense matrices; what it must not depend on."""

from __future__ import annotations

import math

import pytest
import torch

from dreamlora.lora.health import TOTAL, Layer, layers_of, measure, update_rms
from tests.inits.problems import SCALE, problem


def layer(group: str, m: int, n: int, *, rank: int = 3, scale: float = 1.5, seed: int = 0) -> Layer:
    draw = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, n, generator=draw), torch.randn(m, rank, generator=draw)
    return Layer(group, A, B, A, B, scale)


def dense(layer: Layer) -> torch.Tensor:
    return layer.scale * (layer.up.double() @ layer.down.double())


LAYERS = [layer("a", 7, 5), layer("b", 7, 5, seed=1, scale=0.5), layer("b", 4, 9, seed=2), layer("a", 7, 5, seed=3)]


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
    one, other = measure([first])[TOTAL], measure([Layer("a", A, B, A, B, first.scale)])[TOTAL]
    assert other.dw_norm == pytest.approx(one.dw_norm, rel=1e-5)
    assert other.stable_rank == pytest.approx(one.stable_rank, rel=1e-5)
    assert abs(other.balance - one.balance) > 0.05


def test_special_cases():
    A = torch.eye(3, 5)
    zero = measure([Layer("a", A, torch.zeros(7, 3), A, torch.zeros(7, 3), 1.0)])[TOTAL]
    assert (zero.dw_norm, zero.stable_rank, zero.balance) == (0, None, 0)
    even = measure([Layer("a", A, torch.eye(7, 3), A, torch.eye(7, 3), 2.0)])[TOTAL]
    assert even.dw_norm == pytest.approx(2 * math.sqrt(3))
    assert (even.stable_rank, even.balance) == (pytest.approx(3), pytest.approx(1))


def test_a_frozen_start_does_not_count():
    made = problem()
    made.start("pissa")
    layers = layers_of({"": made.net})
    assert measure(layers)[TOTAL].dw_norm == 0
    assert measure(layers)[TOTAL].balance == pytest.approx(1, abs=1e-4)  # PiSSA divides the root evenly
    for target in made.targets:
        target.up.data += 0.1
    after = layers_of({"": made.net})
    total = math.sqrt(sum(float(change.square().sum()) for change in made.change()))
    assert measure(after)[TOTAL].dw_norm == pytest.approx(total, rel=1e-5)
    entries = sum(change.numel() for change in made.change())
    assert update_rms(layers, after)[TOTAL] == pytest.approx(total / math.sqrt(entries), rel=1e-5)


def test_the_update_is_that_of_the_weight():
    after = [
        Layer(x.group, x.A + 0.1, 1.1 * x.B, x.A + 0.1, 1.1 * x.B, x.scale) for x in LAYERS
    ]  # both factors at once: the product of the changes counts too
    found = update_rms(LAYERS, after)
    for group, members in ((TOTAL, [0, 1, 2, 3]), ("a", [0, 3]), ("b", [1, 2])):
        changes = torch.cat([(dense(after[i]) - dense(LAYERS[i])).flatten() for i in members])
        assert found[group] == pytest.approx(float(changes.square().mean().sqrt()))


def test_groups_are_blocks_of_the_denoiser_and_whole_text_encoders():
    first, second = problem(), problem()
    layers = layers_of({"": first.net, "text_encoder": second.net})
    assert [layer.group for layer in layers] == ["conv", "square", "out", *["text_encoder"] * 3]
    assert layers[0].A.shape == (2, 27) and layers[0].scale == SCALE
    assert list(measure(layers)) == [TOTAL, "conv", "square", "out", "text_encoder"]
    assert list(measure(layers[:1])) == [TOTAL]


def test_snapshots_are_copies():
    made = problem()
    [first, *_] = layers_of({"": made.net})
    before = first.A.clone()
    made.targets[0].down.data += 1
    assert torch.equal(first.A, before)
