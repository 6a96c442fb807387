"""How far LoRA-Muon's step is from the exact one, and how little of it depends on the split into factors.

    python benchmarks/step_accuracy.py

Factors of rank 64 of a layer 640 → 768, in float32, in the situations that are hard for a matrix root. Three ways to
the same step: the one that ``LoRAMuon`` takes; every Gram matrix in float64 and its root by eigenvalues; and Gram
matrices in float32 alone. By way and situation:

* error: relative Frobenius distance of the step of ``BA`` from that of float64 data and eigenvalues;
* gauge: how much it changes when the factors are replaced by ``(BR, R⁻¹A)`` with a random R of condition 30;
* largest: the spectral norm of the step, in units of the learning rate, which bounds it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import _cli
import _machine
import torch
from torch import Tensor

from dreamlora.optimizers import LoRAMuon

RANK, WIDTH, OUTPUTS, LR, TRUST, CONDITION = 64, 640, 768, 1e-2, 0.1, 30.0
Factors = tuple[Tensor, Tensor]
Way = Callable[[Factors, Tensor, Tensor], Factors]


def taken(factors: Factors, gA: Tensor, gB: Tensor) -> Factors:
    """``LoRAMuon``'s first step."""
    A, B = (torch.nn.Parameter(p.clone()) for p in factors)
    A.grad, B.grad = gA, gB
    group = {"params": [A, B], "lora_pairs": True}
    LoRAMuon([group], LR, momentum=0.0, rank_power=0.0, layer_power=0.0, trust=TRUST).step()
    return A.detach(), B.detach()


def by_eigenvalues(dtype: torch.dtype) -> Way:
    """The published step with the bound on A, by eigenvalues of Gram matrices of ``dtype``, floored at its rounding."""

    def step(factors: Factors, gA: Tensor, gB: Tensor) -> Factors:
        A, B, gA, gB = (x.to(dtype) for x in (*factors, gA, gB))
        K_A, K_B = A @ A.T, B.T @ B
        root_A, root_B = _power(K_A, -0.5), _power(K_B, -0.5)
        S = _power(K_B, 0.5) @ K_A @ _power(K_B, 0.5)
        reach = (LR / 2 / (2 * TRUST)) ** 2
        bound = S @ torch.linalg.inv(S + reach * torch.eye(RANK, dtype=dtype))
        return A - LR / 2 * root_B @ bound @ _sign(root_B @ gA), B - LR / 2 * _sign(gB @ root_A) @ root_A

    return step


def _power(K: Tensor, exponent: float) -> Tensor:
    """Of a Gram matrix; 0 where it has nothing but rounding."""
    values, vectors = torch.linalg.eigh(K)
    level = 10 * torch.finfo(K.dtype).eps * values[-1]
    powers = torch.where(values > level, values.clamp_min(1e-300 if K.dtype == torch.float64 else 1e-37) ** exponent, 0)
    return vectors * powers @ vectors.T


def _sign(Z: Tensor) -> Tensor:
    wide = Z.shape[0] < Z.shape[1]
    return _power(Z @ Z.T, -0.5) @ Z if wide else Z @ _power(Z.T @ Z, -0.5)


WAYS: dict[str, Way] = {
    "taken": taken,
    "eigenvalues, float64": by_eigenvalues(torch.float64),
    "eigenvalues, float32": by_eigenvalues(torch.float32),
}


def situations(generator: torch.Generator) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """A, B and the gradient of ``BA``, in float64, by name."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def of_condition(condition: float) -> Tensor:
        sizes = torch.logspace(0, -torch.tensor(condition).log10().item(), RANK, dtype=torch.float64)
        return torch.linalg.qr(normal(OUTPUTS, RANK)).Q * sizes @ torch.linalg.qr(normal(RANK, RANK)).Q

    A, G = normal(RANK, WIDTH) / WIDTH**0.5, normal(OUTPUTS, WIDTH) / 100
    none = torch.zeros(OUTPUTS, RANK, dtype=torch.float64)
    few = normal(OUTPUTS, 4) @ normal(4, WIDTH) / 100
    of_four = normal(OUTPUTS, 4) @ normal(4, RANK) / 10
    _, stepped = by_eigenvalues(torch.float64)((A, none), none.T @ G, G @ A.T)
    return {
        "B = 0": (A, none, G),
        "one step after B = 0": (A, stepped, normal(OUTPUTS, WIDTH) / 100),
        "condition of B 1e2": (A, of_condition(1e2), G),
        "condition of B 1e4": (A, of_condition(1e4), G),
        "condition of B 1e7": (A, of_condition(1e7), G),
        "4 gradient directions, B of rank 4 and 1e-9": (A, of_four + 1e-9 * normal(OUTPUTS, RANK), few),
        "B of rank 4 and 1e-5": (A, of_four + 1e-5 * normal(OUTPUTS, RANK), G),
    }


def step_of(way: Way, A: Tensor, B: Tensor, G: Tensor, dtype: torch.dtype) -> Tensor:
    """The change of ``BA``, to first order, as factors and gradients of ``dtype`` give it."""
    factors = A.to(dtype), B.to(dtype)
    a, b = (p.double() for p in factors)
    new_A, new_B = way(factors, (b.T @ G).to(dtype), (G @ a.T).to(dtype))
    return b @ (new_A.double() - a) + (new_B.double() - b) @ a


def measure(seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """Error, gauge and largest, by situation and way."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(RANK, RANK, generator=generator, dtype=torch.float64)).Q for _ in range(2))
    R = U * torch.logspace(0, torch.tensor(CONDITION).log10().item(), RANK, dtype=torch.float64) @ V
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, (A, B, G) in situations(generator).items():
        exact = step_of(WAYS["eigenvalues, float64"], A, B, G, torch.float64)
        found[name] = {}
        for way, step in WAYS.items():
            here = step_of(step, A, B, G, torch.float32)
            there = step_of(step, torch.linalg.solve(R, A), B @ R, G, torch.float32)
            sizes = {
                "error": float((here - exact).norm() / exact.norm()),
                "gauge": float((there - here).norm() / here.norm()),
                "largest": float(torch.linalg.matrix_norm(here, 2)) / LR,
            }
            found[name][way] = {key: float(f"{value:.2g}") for key, value in sizes.items()}
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=_machine.usable_cores())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start = time.perf_counter()
    cases = measure(0)
    for name, ways in cases.items():
        for way, sizes in ways.items():
            print(f"{name:44s} {way:22s}", *(f"{key} {value:8.1e}" for key, value in sizes.items()))
    result: dict[str, Any] = {
        "command": _machine.command("step_accuracy.py"),
        "rank": RANK,
        "condition_of_gauge": CONDITION,
        "cases": cases,
        "seconds": round(time.perf_counter() - start, 1),
        "machine": _machine.describe(options.threads),
    }
    print(f"wrote {_machine.write('step_accuracy', result)}")


if __name__ == "__main__":
    _cli.start(main)
