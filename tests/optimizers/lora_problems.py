"""Small LoRA problems with known answers, shared by the optimizer tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

Pairs = list[tuple[nn.Parameter, nn.Parameter]]
SHAPES = ((10, 7, 3), (10, 7, 3), (6, 12, 3), (5, 9, 2))  # (m, n, r), two alike and two ranks


def make_pairs(
    shapes: Sequence[tuple[int, int, int]] = SHAPES,
    dtype: torch.dtype = torch.float64,
    zero_B: bool = False,
    seed: int = 0,
) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for m, n, r in shapes:
        A = torch.randn(r, n, generator=generator, dtype=torch.float64)
        B = torch.randn(m, r, generator=generator, dtype=torch.float64) * (0 if zero_B else 1)
        pairs.append((nn.Parameter(A.to(dtype)), nn.Parameter(B.to(dtype))))
    return pairs


def pair_group(pairs: Pairs, **settings) -> dict:
    return {"params": [factor for pair in pairs for factor in pair], "lora_pairs": True, **settings}


def targets(pairs: Pairs, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B.shape[0], A.shape[1], generator=generator, dtype=torch.float64) for A, B in pairs]


def quadratic_gradients(pairs: Pairs, wanted: list[Tensor], scaling: float = 1.0) -> list[Tensor]:
    """Backward pass of ``½ Σ ‖s·BA − W‖²``; returns the full gradients ``G``."""
    full = []
    for (A, B), W in zip(pairs, wanted, strict=True):
        A.grad = B.grad = None
        product = scaling * (B @ A)
        (0.5 * (product - W.to(product.dtype)).square().sum()).backward()
        full.append((product - W.to(product.dtype)).detach())
    return full


def descend(pairs: Pairs, optimizer: torch.optim.Optimizer, steps: int) -> list[Tensor]:
    """Train on the quadratic; returns the products ``BA``."""
    wanted = targets(pairs)
    for _ in range(steps):
        quadratic_gradients(pairs, wanted)
        optimizer.step()
    return [(B @ A).detach() for A, B in pairs]


def regauge(pairs: Pairs, make_R: Callable[[int], Tensor]) -> Pairs:
    """The same products from other factors: ``(B, A) -> (BR, R⁻¹A)``."""
    changed = []
    for A, B in pairs:
        R = make_R(A.shape[0]).to(A.dtype)
        changed.append((nn.Parameter(torch.linalg.solve(R, A.detach())), nn.Parameter(B.detach() @ R)))
    return changed


def values(pairs: Pairs) -> list[Tensor]:
    return [p.detach().clone() for pair in pairs for p in pair]


def cast(pairs: Pairs, dtype: torch.dtype) -> Pairs:
    return [(nn.Parameter(A.detach().to(dtype)), nn.Parameter(B.detach().to(dtype))) for A, B in pairs]


def relative_distance(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((x - y).norm() / y.norm()) for x, y in zip(found, expected, strict=True))


def general(r: int) -> Tensor:
    return torch.randn(r, r, generator=torch.Generator().manual_seed(5), dtype=torch.float64) + 2 * torch.eye(r)


def scaled_rotation(r: int) -> Tensor:
    return 3.0 * torch.linalg.qr(general(r)).Q
