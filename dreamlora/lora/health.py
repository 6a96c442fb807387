"""LoRA health: how far the weights have moved, in how many directions, and how large a step was.

Everything is computed from Gram matrices of the factors, batched over layers of one shape: no m×n matrix is formed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dreamlora.linalg import gram_columns, gram_rows
from dreamlora.lora import offset

TOTAL = ""
"""The group of all layers."""


@dataclass(frozen=True)
class Layer:
    """The factors of one layer at one moment; convolutions flattened behind dimension 0.

    Attributes:
        group: of layers that are shown together.
        A: ``(r, n)`` as it trains.
        B: ``(m, r)`` as it trains.
        down: ``(k, n)``, and
        up: ``(m, k)``: the change of the weight is ``scale · up · down``.
        scale: ``alpha / rank``.
    """

    group: str
    A: Tensor
    B: Tensor
    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True)
class Health:
    """Of a group of layers.

    Attributes:
        dw_norm: ``‖ΔW‖_F`` of all layers together.
        stable_rank: ``‖ΔW‖_F² / ‖ΔW‖₂²``, between 1 and the rank, mean over the layers; None where ΔW is zero.
        balance: ``1 - ‖A Aᵀ - Bᵀ B‖_F / (‖A Aᵀ‖_F + ‖Bᵀ B‖_F)``, mean over the layers: 1 if the Gram matrices are
            equal, 0 if one factor is zero.
    """

    dw_norm: float
    stable_rank: float | None
    balance: float


def layers_of(modules: Mapping[str, nn.Module]) -> list[Layer]:
    """Snapshots (copies) of all adapted layers.

    Args:
        modules: by the name that a group gets which is the whole module; of the module named "" the children are the
            groups, such as "down_blocks".
    """
    found = []
    for module_name, module in modules.items():
        for name, layer in offset.adapted_layers(module):
            A, B = (side[offset.ADAPTER].weight.detach() for side in (layer.lora_A, layer.lora_B))
            A, B, down, up = (x.flatten(1).clone() for x in (A, B, *offset.factors(layer)))
            group = module_name or name.split(".")[0]
            found.append(Layer(group, A, B, down, up, float(layer.scaling[offset.ADAPTER])))
    return found


def measure(layers: Sequence[Layer]) -> dict[str, Health]:
    """Health by group, and of all layers under ``TOTAL``."""
    squares, ranks, balances = (torch.zeros(len(layers), dtype=torch.float64) for _ in range(3))
    for members in _alike(layers, "down", "up"):
        scale = torch.tensor([layers[i].scale for i in members], dtype=torch.float64)
        square, spectral = _sizes(_stack(layers, members, "down"), _stack(layers, members, "up"))
        squares[members] = scale**2 * square
        ranks[members] = torch.where(spectral > 0, square / spectral.clamp_min(1e-300), torch.nan)
    for members in _alike(layers, "A", "B"):
        balances[members] = _balance(_stack(layers, members, "A"), _stack(layers, members, "B"))
    return {
        group: Health(
            float(squares[members].sum().sqrt()),
            float(ranks[members].nanmean()) if not ranks[members].isnan().all() else None,
            float(balances[members].mean()),
        )
        for group, members in _groups(layers).items()
    }


def update_rms(before: Sequence[Layer], after: Sequence[Layer]) -> dict[str, float]:
    """Root mean square of the entries of the change of ΔW between two moments, by group.

    Of the weight and not of the factors, so that ranks, scales and optimizers can be compared:
    ``B₁A₁ − B₀A₀ = [B₁, B₁ − B₀] [A₁ − A₀ ; A₀]``.
    """
    squares = torch.zeros(len(after), dtype=torch.float64)
    for members in _alike(after, "A", "B"):
        (A0, B0), (A1, B1) = ((_stack(x, members, "A"), _stack(x, members, "B")) for x in (before, after))
        square, _ = _sizes(torch.cat([A1 - A0, A0], 1), torch.cat([B1, B1 - B0], 2), spectral=False)
        squares[members] = torch.tensor([after[i].scale for i in members], dtype=torch.float64) ** 2 * square
    entries = torch.tensor([layer.B.shape[0] * layer.A.shape[1] for layer in after], dtype=torch.float64)
    return {
        group: float((squares[members].sum() / entries[members].sum()).sqrt())
        for group, members in _groups(after).items()
    }


def _sizes(down: Tensor, up: Tensor, *, spectral: bool = True) -> tuple[Tensor, Tensor]:
    """``‖U D‖_F²`` and ``‖U D‖₂²`` ``(b,)`` of D ``(b, k, n)`` and U ``(b, m, k)``, on the CPU.

    With ``D Dᵀ = E diag(e) Eᵀ`` the eigenvalues of ``√e Eᵀ (UᵀU) E √e`` are the squared singular values of U D.
    """
    KD, KU = gram_rows(down), gram_columns(up)
    square = (KD * KU).sum((1, 2)).clamp_min(0)
    if not spectral:
        return square.cpu(), square.cpu()
    e, E = torch.linalg.eigh(KD)
    root = E * e.clamp_min(0).sqrt()[:, None]
    return square.cpu(), torch.linalg.eigvalsh(root.mT @ KU @ root)[:, -1].clamp_min(0).cpu()


def _balance(A: Tensor, B: Tensor) -> Tensor:
    KA, KB = gram_rows(A), gram_columns(B)
    norm = torch.linalg.matrix_norm
    return (1 - norm(KA - KB) / (norm(KA) + norm(KB)).clamp_min(1e-300)).cpu()


def _alike(layers: Sequence[Layer], down: str, up: str) -> list[list[int]]:
    """Numbers of layers whose factors have the same shape and place."""
    found: dict[Any, list[int]] = defaultdict(list)
    for number, layer in enumerate(layers):
        A, B = getattr(layer, down), getattr(layer, up)
        found[A.shape, B.shape, A.device].append(number)
    return list(found.values())


def _stack(layers: Sequence[Layer], members: Sequence[int], side: str) -> Tensor:
    """In float64, as Gram matrices square the condition number."""
    return torch.stack([getattr(layers[i], side) for i in members]).double()


def _groups(layers: Sequence[Layer]) -> dict[str, list[int]]:
    """Members of ``TOTAL`` and of every group, in the order of the model; one group alone is the total."""
    found: dict[str, list[int]] = defaultdict(list)
    for number, layer in enumerate(layers):
        found[layer.group].append(number)
    return {TOTAL: list(range(len(layers))), **(found if len(found) > 1 else {})}
