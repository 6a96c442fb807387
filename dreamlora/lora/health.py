"""Health of an adapter: how far the weights have moved, in how many directions, and how large a step was.

What pairs of factors do is computed from their Gram matrices, batched over layers of one shape, without m×n matrices.
It happens on the CPU: in float64, which Apple's GPUs do not have, and without taking memory from the training.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from dreamlora.linalg import gram_columns, gram_rows
from dreamlora.lora.changes import BaseRows, Change, Directed, Product, change_of
from dreamlora.lora.offset import FrozenStart
from dreamlora.lora.pairs import AdaptedLayer, tuned_layers

TOTAL = ""
"""The group of all layers."""


@dataclass(frozen=True)
class Health:
    """Of a group of layers.

    Attributes:
        dw_norm: ``‖ΔW‖_F`` of all layers together.
        stable_rank: ``‖ΔW‖_F² / ‖ΔW‖₂²``, between 1 and the rank, mean over the layers; None where ΔW is zero, and for
            LoHas and LoKrs; of a DoRA that of B A.
        balance: ``1 - ‖A Aᵀ - Bᵀ B‖_F / (‖A Aᵀ‖_F + ‖Bᵀ B‖_F)``, mean over the layers: 1 if the Gram matrices are
            equal, 0 if one factor is zero; None of layers without a pair of factors.
    """

    dw_norm: float
    stable_rank: float | None
    balance: float | None


def snapshots(modules: Mapping[str, nn.Module]) -> list[Change]:
    """Copies of all adapted layers on the CPU, convolutions of pairs flattened behind dimension 0.

    Args:
        modules: by the name that a group gets which is the whole module; of the module named "" the children are the
            groups, such as "down_blocks".
    """
    layers = [change_of(layer) for name, module in modules.items() for layer in tuned_layers(module, prefix=name)]
    copies = iter(_copies([x for layer in layers for x in _tensors(layer)]))
    return [_copied(layer, copies) for layer in layers]


def _tensors(layer: Change) -> list[Tensor]:
    if isinstance(layer, Product):
        return list(layer.tensors.values())
    start, rows = [layer.start.A, layer.start.B] if layer.start else [], layer.rows if _is_directed(layer) else []
    return [layer.A, layer.B, *start, *rows]


def _copied(layer: Change, copies: Iterator[Tensor]) -> Change:
    """The layer with copies of its ``_tensors``."""
    if isinstance(layer, Product):
        return replace(layer, tensors={name: next(copies) for name in layer.tensors})
    A, B = next(copies).flatten(1), next(copies).flatten(1)
    start = layer.start and FrozenStart(next(copies).flatten(1), next(copies).flatten(1))
    if _is_directed(layer):
        return replace(layer, A=A, B=B, start=start, rows=BaseRows(next(copies), next(copies), next(copies)))
    return replace(layer, A=A, B=B, start=start)


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """On the CPU. From a GPU all are queued and then waited for once, not one by one."""
    copies = [x.detach().to("cpu", copy=True, non_blocking=x.is_cuda) for x in tensors]
    for device in {x.device for x in tensors if x.is_cuda}:
        torch.cuda.synchronize(device)
    return copies


def measure(layers: Sequence[Change]) -> dict[str, Health]:
    """Health by group, and of all layers under ``TOTAL``.

    Args:
        layers: ``snapshots``.
    """
    squares, ranks, balances = (torch.full((len(layers),), torch.nan, dtype=torch.float64) for _ in range(3))
    for members, pairs in _alike(layers):
        downs, ups = zip(*(pair.factors() for pair in pairs), strict=True)
        square, spectral = _sizes(_stacked(downs), _stacked(ups))
        squares[members] = _scaling(pairs) ** 2 * square
        ranks[members] = torch.where(spectral > 0, square / spectral.clamp_min(1e-300), torch.nan)
        balances[members] = _balance(_stacked([pair.A for pair in pairs]), _stacked([pair.B for pair in pairs]))
    for number, layer in enumerate(layers):
        if isinstance(layer, Directed | Product):
            squares[number] = layer.square_from(None)
    return {
        group: Health(float(squares[members].sum().sqrt()), _mean(ranks[members]), _mean(balances[members]))
        for group, members in _groups(layers).items()
    }


def update_rms(before: Sequence[Change], after: Sequence[Change]) -> dict[str, float]:
    """Root mean square of the entries of the change of ΔW between two moments, by group.

    Of the weight and not of the factors, so that ranks, scales and optimizers can be compared:
    ``B₁A₁ − B₀A₀ = [B₁, B₁ − B₀] [A₁ − A₀ ; A₀]``.

    Args:
        before, after: ``snapshots``.
    """
    squares = torch.zeros(len(after), dtype=torch.float64)
    for members, pairs in _alike(after):
        earlier: list[Any] = [before[i] for i in members]
        A0, A1 = (_stacked([pair.A for pair in moment]) for moment in (earlier, pairs))
        B0, B1 = (_stacked([pair.B for pair in moment]) for moment in (earlier, pairs))
        square, _ = _sizes(torch.cat([A1 - A0, A0], 1), torch.cat([B1, B1 - B0], 2), spectral=False)
        squares[members] = _scaling(pairs) ** 2 * square
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        if isinstance(new, Directed | Product):
            squares[number] = new.square_from(old)  # type: ignore[arg-type] # of the same layer, so of the same kind
    entries = torch.tensor([layer.entries for layer in after], dtype=torch.float64)
    return {
        group: float((squares[members].sum() / entries[members].sum()).sqrt())
        for group, members in _groups(after).items()
    }


def _scaling(pairs: Sequence[AdaptedLayer]) -> Tensor:
    return torch.tensor([pair.scaling for pair in pairs], dtype=torch.float64)


def _is_directed(layer: AdaptedLayer) -> TypeGuard[Directed]:
    return isinstance(layer, Directed)


def _mean(values: Tensor) -> float | None:
    """Of those that are known."""
    return None if values.isnan().all() else float(values.nanmean())


def _sizes(down: Tensor, up: Tensor, *, spectral: bool = True) -> tuple[Tensor, Tensor]:
    """``‖U D‖_F²`` and ``‖U D‖₂²`` ``(b,)`` of D ``(b, k, n)`` and U ``(b, m, k)``.

    With ``D Dᵀ = E diag(e) Eᵀ`` the eigenvalues of ``√e Eᵀ (UᵀU) E √e`` are the squared singular values of U D.
    """
    KD, KU = gram_rows(down), gram_columns(up)
    square = (KD * KU).sum((1, 2)).clamp_min(0)
    if not spectral:
        return square, square
    e, E = torch.linalg.eigh(KD)
    root = E * e.clamp_min(0).sqrt()[:, None]
    return square, torch.linalg.eigvalsh(root.mT @ KU @ root)[:, -1].clamp_min(0)


def _balance(A: Tensor, B: Tensor) -> Tensor:
    KA, KB = gram_rows(A), gram_columns(B)
    norm = torch.linalg.matrix_norm
    return 1 - norm(KA - KB) / (norm(KA) + norm(KB)).clamp_min(1e-300)


def _alike(layers: Sequence[Change]) -> list[tuple[list[int], list[AdaptedLayer]]]:
    """Layers with pairs whose factors have the same shape, with or without a frozen start; their numbers before."""
    numbers_by_shape: dict[Any, list[int]] = defaultdict(list)
    for number, layer in enumerate(layers):
        if not isinstance(layer, Product):
            numbers_by_shape[layer.A.shape, layer.B.shape, layer.start is None].append(number)
    pairs: list[Any] = list(layers)
    return [(numbers, [pairs[number] for number in numbers]) for numbers in numbers_by_shape.values()]


def _stacked(factors: Sequence[Tensor]) -> Tensor:
    """In float64, as Gram matrices square the condition number."""
    return torch.stack(list(factors)).double()


def _groups(layers: Sequence[Change]) -> dict[str, list[int]]:
    """Members of ``TOTAL`` and of every group, in the order of the model; one group alone is the total."""
    members: dict[str, list[int]] = defaultdict(list)
    for number, layer in enumerate(layers):
        members[layer.name.partition(".")[0]].append(number)
    return {TOTAL: list(range(len(layers))), **(members if len(members) > 1 else {})}
