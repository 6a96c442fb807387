"""Adapters of layers that are one elsewhere, against dense matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dreamlora.lora.formats._stacks import parted, stacked, swapped
from dreamlora.lora.weights import LayerWeights, lora_weights

ROWS = (4, 2, 6)
COLUMNS = 5


def lora(rows: int, rank: int, *, alpha: float | None = None, seed: int = 0, conv: bool = False) -> LayerWeights:
    draw = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, COLUMNS, *((3, 3) if conv else ()), generator=draw)
    up = torch.randn(rows, rank, *((1, 1) if conv else ()), generator=draw)
    return lora_weights(down, up, alpha)


def loha(rows: int, rank: int, *, alpha: float | None = None, seed: int = 0) -> LayerWeights:
    draw = torch.Generator().manual_seed(seed)
    shapes = {"hada_w1_a": (rows, rank), "hada_w1_b": (rank, COLUMNS)}
    shapes |= {name.replace("1", "2"): shape for name, shape in shapes.items()}
    tensors = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    return LayerWeights("loha", tensors, float(rank) if alpha is None else alpha)


def lokr(rows: tuple[int, int], columns: tuple[int, int], alpha: float = 1.0) -> LayerWeights:
    draw = torch.Generator().manual_seed(0)
    w1, w2 = (torch.randn(shape, generator=draw) for shape in zip(rows, columns, strict=True))
    return LayerWeights("lokr", {"lokr_w1": w1, "lokr_w2": w2}, alpha)


def dense(parts: list[LayerWeights | None], rows: tuple[int, ...] = ROWS) -> Tensor:
    """ΔW of the whole; zeros where there is none."""
    shape = next(part for part in parts if part is not None).delta().shape[1:]
    return torch.cat(
        [torch.zeros(count, *shape) if part is None else part.delta() for part, count in zip(parts, rows, strict=True)]
    )


def same(one: LayerWeights, other: LayerWeights) -> bool:
    """Bit for bit."""
    pairs = [(one.tensors[name], other.tensors[name]) for name in one.tensors]
    return one.tensors.keys() == other.tensors.keys() and all(torch.equal(*pair) for pair in pairs)


CASES: dict[str, dict[str, Any]] = {
    "ranks that differ": {},
    "scales that differ": {"alphas": (1.0, 3.0, 0.5)},
    "one scale": {"alphas": (0.5, 1.0, 1.5)},
    "the first is missing": {"missing": (0,)},
    "the middle is missing": {"missing": (1,), "alphas": (1.0, 3.0, 0.5)},
    "the last alone": {"missing": (0, 1), "alphas": (1.0, 3.0, 0.5)},
}


def parts_of(make: Any, *, alphas: tuple[Any, ...] = (None,) * 3, missing: tuple[int, ...] = (), **more: Any) -> Any:
    return [
        None if number in missing else make(ROWS[number], 1 + number, alpha=alphas[number], seed=number, **more)
        for number in range(3)
    ]


@pytest.mark.parametrize("options", [pytest.param(options, id=name) for name, options in CASES.items()])
@pytest.mark.parametrize(
    ("make", "more"),
    [
        pytest.param(lora, {}, id="lora"),
        pytest.param(lora, {"conv": True}, id="conv"),
        pytest.param(loha, {}, id="loha"),
    ],
)
def test_rows_lie_one_below_the_other(make, more, options):
    parts = parts_of(make, **options, **more)
    whole = stacked(parts, ROWS)
    assert whole.rows == sum(ROWS)
    assert whole.rank == sum(part.rank for part in parts if part is not None)
    torch.testing.assert_close(whole.delta(), dense(parts))


@pytest.mark.parametrize("options", [pytest.param(options, id=name) for name, options in CASES.items()])
@pytest.mark.parametrize(
    ("make", "more"),
    [
        pytest.param(lora, {}, id="lora"),
        pytest.param(lora, {"conv": True}, id="conv"),
        pytest.param(loha, {}, id="loha"),
    ],
)
def test_parts_of_a_stack_are_what_it_was_made_of(make, more, options):
    parts = parts_of(make, **options, **more)
    found = parted(stacked(parts, ROWS), ROWS)
    for part, again in zip(parts, found, strict=True):
        if part is None:
            assert again is None
            continue
        assert again.rank == part.rank
        torch.testing.assert_close(again.delta(), part.delta())
        if options.get("alphas") != (1.0, 3.0, 0.5):
            assert same(part, again)
            assert again.alpha == pytest.approx(part.alpha)


@pytest.mark.parametrize("make", [lora, loha])
def test_one_that_was_whole_comes_back_bit_for_bit(make):
    """Its parts have its A, each with its rows of B, and its scale."""
    whole = make(sum(ROWS), 4, alpha=3.0)
    parts = parted(whole, ROWS)
    assert [part.rows for part in parts] == list(ROWS)
    assert [part.alpha for part in parts] == [3.0] * 3
    torch.testing.assert_close(dense(parts), whole.delta())
    again = stacked(parts, ROWS)
    assert same(again, whole)
    assert again.alpha == whole.alpha


@pytest.mark.parametrize("make", [lora, loha])
def test_a_whole_with_rows_of_zeros_comes_back_bit_for_bit(make):
    whole = make(sum(ROWS), 4)
    name = "lora_B" if make is lora else "hada_w1_a"
    whole.tensors[name][ROWS[0] : ROWS[0] + ROWS[1]] = 0
    parts = parted(whole, ROWS)
    assert parts[1] is None
    again = stacked(parts, ROWS)
    assert again.rank == 4
    torch.testing.assert_close(again.delta(), whole.delta())
    if make is lora:
        assert same(again, whole)


def test_parts_leave_out_ranks_that_do_nothing_in_them():
    whole = lora(sum(ROWS), 4, alpha=2.0)
    whole.up[: ROWS[0], 2:] = 0
    first, *_ = parted(whole, ROWS)
    assert first.rank == 2
    torch.testing.assert_close(first.delta(), whole.delta()[: ROWS[0]])


def test_a_part_of_a_loha_needs_both_factors():
    """W1 ⊙ W2 is nothing where either is."""
    whole = loha(sum(ROWS), 3)
    whole.tensors["hada_w2_a"][: ROWS[0]] = 0
    whole.tensors["hada_w1_a"][ROWS[0] : ROWS[0] + ROWS[1], 1:] = 0
    found = parted(whole, ROWS)
    assert found[0] is None
    torch.testing.assert_close(dense(found), whole.delta())


def test_magnitudes_go_with_their_rows():
    """A DoRA's rows are normalised one by one, so that a stack of DoRAs is the DoRA of the stack."""
    draw = torch.Generator().manual_seed(9)
    weight = torch.randn(sum(ROWS), COLUMNS, generator=draw)
    parts = [
        LayerWeights("lora", lora(rows, 2, seed=rows).tensors, 1.0, torch.rand(rows, generator=draw)) for rows in ROWS
    ]
    whole = stacked(parts, ROWS)
    expected = torch.cat([applied(part, rows) for part, rows in zip(parts, weight.split(list(ROWS)), strict=True)])
    torch.testing.assert_close(applied(whole, weight), expected)
    for part, again in zip(parts, parted(whole, ROWS), strict=True):
        assert same(part, again)
        assert torch.equal(part.magnitude, again.magnitude)


def applied(dora: LayerWeights, weight: Tensor) -> Tensor:
    changed = weight + dora.delta()
    return dora.magnitude[:, None] * changed / changed.norm(dim=1, keepdim=True)


def test_a_dora_without_a_change_keeps_its_magnitudes():
    whole = lora(sum(ROWS), 2)
    whole.up[: ROWS[0]] = 0
    whole = LayerWeights("lora", whole.tensors, 2.0, torch.arange(float(sum(ROWS))))
    first = parted(whole, ROWS)[0]
    assert torch.equal(first.magnitude, torch.arange(float(ROWS[0])))
    assert not first.delta().any()


@pytest.mark.parametrize("missing", ["a layer", "magnitudes"])
def test_a_dora_of_some_rows_is_refused(missing):
    """Rows without a magnitude would need those of the weight, which is not here."""
    parts: list[Any] = [LayerWeights("lora", lora(rows, 2).tensors, 1.0, torch.ones(rows)) for rows in ROWS]
    parts[1] = None if missing == "a layer" else lora(ROWS[1], 2)
    with pytest.raises(ValueError, match="a DoRA of some of the layers"):
        stacked(parts, ROWS)


def test_rows_of_a_lokr_become_lokrs():
    """In general they are no Kronecker product of the same factors: 4 rows of three times 4."""
    for whole in (lokr((3, 4), (5, 2)), lokr((2, 6), (2, 3), alpha=7.0)):
        found = parted(whole, ROWS)
        assert [part.kind for part in found] == ["lokr"] * 3
        assert [part.rows for part in found] == list(ROWS)
        torch.testing.assert_close(torch.cat([part.delta() for part in found]), whole.delta())


def test_what_cannot_be_joined_is_refused():
    with pytest.raises(ValueError, match="a lokr of several layers"):
        stacked([lokr((2, 2), (2, 2)), None, None], ROWS)
    with pytest.raises(ValueError, match="of several layers"):
        stacked([lora(4, 1), loha(2, 1), None], ROWS)
    cored = LayerWeights("loha", {**loha(4, 1).tensors, "hada_t1": torch.ones(1, 1, 3, 3)}, 1.0)
    with pytest.raises(ValueError, match="of several layers"):
        stacked([cored, None, None], ROWS)
    with pytest.raises(ValueError, match="a convolution's"):
        parted(cored, (2, 2))


def test_a_single_layer_stays_as_it_is():
    for adapter in (lora(4, 2), loha(4, 2), lokr((2, 2), (2, 2))):
        assert stacked([adapter], (4,)) is adapter
        assert parted(adapter, (4,)) == [adapter]


@pytest.mark.parametrize("make", [lora, loha])
def test_halves_change_places(make):
    adapter = make(6, 2, alpha=5.0)
    adapter = LayerWeights(adapter.kind, adapter.tensors, adapter.alpha, torch.arange(6.0))
    found = swapped(adapter)
    upper, lower = adapter.delta().split(3)
    torch.testing.assert_close(found.delta(), torch.cat([lower, upper]))
    assert found.magnitude.tolist() == [3, 4, 5, 0, 1, 2]
    assert same(swapped(found), adapter)
    with pytest.raises(ValueError, match="cannot change places"):
        swapped(lokr((2, 3), (2, 2)))
