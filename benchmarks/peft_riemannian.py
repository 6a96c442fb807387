"""PEFT's Riemannian optimizer as it is, and with the small changes of docs/upstream.md.

    python benchmarks/peft_riemannian.py

* damping: a GPT-2 of two layers with random weights learns four sentences by heart, LoRA from B = 0: how long the steps
  of A are, and the loss after the last step;
* kernels: which of the LoRA pairs of SD 1.5's UNet are found, and what a 1 x 1 convolution learns beside the linear
  layer with the same numbers;
* other products: PEFT's variants of LoRA that keep the names of a pair and are none;
* loop: processor time of the preconditioning alone, on the pairs of SD 1.5 (attention layers), one thread.

Writes results/peft_riemannian.json.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import _cli
import _machine
import _unets
import optimizer_step
import peft
import torch
from peft.optimizers import create_riemannian_optimizer, riemannian
from peft.tuners.lora import config as lora_config
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import GPT2Config, GPT2LMHeadModel

from dreamlora.optimizers import LoraPair, check_compatibility, find_lora_pairs

Pairs = list[tuple[nn.Parameter, nn.Parameter]]
SHOWN = (2, 10, 30, 100)
"""Steps whose length is told; at the first one the gradient of A is zero."""
RATE = 1e-3
RELATIVE = 0.1
REGS = (1e-6, 1e-4, 1e-2)
"""Damping of PEFT's rows; the last is its default."""


def damped_inverse(K: Tensor, damping: float) -> Tensor:
    """``(K/τ + damping·I)⁻¹`` ``(b, r, r)``, ``τ`` the mean eigenvalue; where K is zero, as if K were τI."""
    identity = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    tau = K.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    K = torch.where(tau > 0, K / tau, identity)
    return torch.cholesky_inverse(torch.linalg.cholesky(K + damping * identity))


class Changed:
    """In place of PEFT's preconditioner: relative damping, kernels flattened, all inverses of one rank at once."""

    def __init__(self, lora_pairs: Pairs, reg: float) -> None:
        self.lora_pairs, self.reg = lora_pairs, reg

    @torch.no_grad()
    def step(self) -> None:
        by_rank: dict[Any, list[tuple[Tensor, Tensor, bool]]] = {}
        for A, B in self.lora_pairs:
            a, b = (p.detach().flatten(1).float() for p in (A, B))
            for p, K, left in ((A, b.T @ b, True), (B, a @ a.T, False)):
                if p.grad is not None:
                    by_rank.setdefault((K.shape, K.device), []).append((p.grad, K, left))
        for group in by_rank.values():
            inverses = damped_inverse(torch.stack([K for _, K, _ in group]), self.reg)
            for (gradient, _, left), P in zip(group, inverses, strict=True):
                g = gradient.flatten(1).float()
                gradient.copy_((P @ g if left else g @ P).view(gradient.shape))


class Cholesky(riemannian._RiemannianPreconditioner):
    """PEFT's loop, with the inverse of a positive definite matrix in place of its pseudo-inverse."""

    @staticmethod
    def _damped_inverse(mat: Tensor, reg: float) -> Tensor:
        return torch.cholesky_inverse(torch.linalg.cholesky(mat + reg * torch.eye(len(mat), device=mat.device)))


def pairs_with_kernels(model: nn.Module) -> Pairs:
    """In place of PEFT's search, which wants matrices."""
    return [(pair.A, pair.B) for pair in find_lora_pairs(model)]


@contextlib.contextmanager
def changed() -> Iterator[None]:
    """``create_riemannian_optimizer`` with the changes."""
    parts = {"_RiemannianPreconditioner": Changed, "_collect_lora_pairs": pairs_with_kernels}
    with mock.patch.multiple(riemannian, **parts):
        yield


def peft_optimizer(model: Any, reg: float) -> Optimizer:
    return create_riemannian_optimizer(model, AdamW, lr=RATE, reg=reg, weight_decay=0.0)


def relative_optimizer(model: Any) -> Optimizer:
    with changed():
        return peft_optimizer(model, RELATIVE)


def language_model(seed: int) -> nn.Module:
    """GPT-2, two layers of width 32, with LoRA of rank 4 on all linear layers."""
    sizes = {"vocab_size": 50, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=0))
    lora = peft.LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", fan_in_fan_out=True)
    return peft.get_peft_model(model, lora)


def descend(make: Callable[[nn.Module], Optimizer], seed: int, steps: int) -> dict[str, Any]:
    """Root mean square of the steps of A by the learning rate; mean eigenvalues of ``BᵀB``; the last loss."""
    model = language_model(seed)
    optimizer = make(model)
    tokens = torch.randint(50, (4, 12), generator=torch.Generator().manual_seed(seed))
    pairs = find_lora_pairs(model)
    moved, sizes = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        before = [pair.A.detach().clone() for pair in pairs]
        sizes.append(statistics.mean(pair.B.detach().square().sum().item() / pair.B.shape[1] for pair in pairs))
        optimizer.step()
        steps_of_A = [(pair.A.detach() - A).flatten() for pair, A in zip(pairs, before, strict=True)]
        moved.append(torch.cat(steps_of_A).square().mean().sqrt().item() / RATE)
    return {"moved": moved, "sizes": sizes, "loss": loss.item()}


def measure_damping(seeds: int, steps: int) -> dict[str, Any]:
    """By optimizer, means over seeds: what ``descend`` finds at the steps that are shown."""
    makers: dict[str, Callable[[nn.Module], Optimizer]] = {
        "adamw": lambda model: AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    }
    makers |= {f"reg {reg:g}": lambda model, reg=reg: peft_optimizer(model, reg) for reg in REGS}
    makers[f"relative {RELATIVE:g}"] = relative_optimizer
    found = {}
    for name, make in makers.items():
        runs = [descend(make, seed, steps) for seed in range(seeds)]
        shown = [step for step in SHOWN if step <= steps]
        found[name] = {
            "step_of_A": {step: round(statistics.mean(run["moved"][step - 1] for run in runs), 3) for step in shown},
            "eigenvalue_of_BtB": {step: statistics.mean(run["sizes"][step - 1] for run in runs) for step in shown},
            "loss": round(statistics.mean(run["loss"] for run in runs), 4),
        }
    return {"rate": RATE, "seeds": seeds, "steps": steps, "optimizers": found}


def count_kernels() -> dict[str, int]:
    """LoRA pairs of SD 1.5's UNet, all its linear and convolutional layers: how many, and how many PEFT finds."""
    unet = _unets.random_unet(_unets.SD15, "meta")
    layers = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    with torch.device("meta"):
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=layers), unet)
    return {"pairs": len(find_lora_pairs(unet)), "found": len(riemannian._collect_lora_pairs(unet))}


class OneLayer(nn.Module):
    """A linear layer or a 1 x 1 convolution with the same numbers, and a linear layer besides."""

    def __init__(self, convolution: bool) -> None:
        super().__init__()
        self.layer = nn.Conv2d(16, 12, 1) if convolution else nn.Linear(16, 12)
        self.other = nn.Linear(12, 12)
        torch.manual_seed(0)
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["layer", "other"]), self)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for _, p in sorted(self.named_parameters()):
                p.copy_((torch.randn(p.numel(), generator=generator) / 4).view(p.shape))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x[..., None, None])[..., 0, 0] if isinstance(self.layer.base_layer, nn.Conv2d) else self.layer(x)
        return self.other(torch.tanh(y))


def difference_of_kernels(make: Callable[[nn.Module], Optimizer]) -> float:
    """How far apart the two products are after 20 steps, relative to how far the linear layer's has moved."""
    products = []
    for convolution in (False, True):
        model = OneLayer(convolution)
        optimizer, pair = make(model), find_lora_pairs(model)[0]
        start = (pair.B.flatten(1) @ pair.A.flatten(1)).detach()
        x = torch.randn(32, 16, generator=torch.Generator().manual_seed(2))
        for _ in range(20):
            optimizer.zero_grad()
            (model(x) - x[:, :12]).square().mean().backward()
            optimizer.step()
        products.append((pair.B.flatten(1) @ pair.A.flatten(1)).detach() - start)
    linear, kernel = products
    return float((kernel - linear).norm() / linear.norm())


def measure_kernels() -> dict[str, Any]:
    """Counts, and the difference that the optimizer makes between two layers that are the same."""
    differences = {
        "peft": difference_of_kernels(lambda model: peft_optimizer(model, REGS[-1])),
        "changed": difference_of_kernels(relative_optimizer),
    }
    return {"sd15": count_kernels(), "difference": differences}


class Experts(nn.Module):
    """Three experts in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eoi->beo", x, self.weight).mean(1)


def other_products() -> dict[str, float | str]:
    """``‖gA Aᵀ − Bᵀ gB‖`` relative, of what PEFT takes for a pair; or the error of its first step."""
    variants: dict[str, dict[str, Any]] = {
        "plain": {},
        "experts": {"target_modules": [], "target_parameters": ["0.weight"]},
        "BD-LoRA, A": {"use_bdlora": lora_config.BdLoraConfig(target_modules_bd_a=["1"], nblocks=2)},
        "BD-LoRA, B": {"use_bdlora": lora_config.BdLoraConfig(target_modules_bd_b=["1"], nblocks=2)},
    }
    if hasattr(lora_config, "KasaConfig"):
        variants["KaSA"] = {"kasa_config": lora_config.KasaConfig()}
    found: dict[str, float | str] = {}
    for name, settings in variants.items():
        torch.manual_seed(0)
        model = nn.Sequential(Experts(), nn.Linear(6, 6))
        peft.inject_adapter_in_model(peft.LoraConfig(**{"r": 2, "target_modules": ["1"], **settings}), model)
        with torch.no_grad():
            for key, p in model.named_parameters():
                if ".lora_" in key:
                    p.normal_()
        optimizer = peft_optimizer(model, REGS[-1])
        model(torch.randn(5, 8)).square().mean().backward()
        [(A, B)] = riemannian._collect_lora_pairs(model)
        if A.shape[0] == B.shape[1]:
            found[name] = check_compatibility([LoraPair("pair", A, B)])["pair"]
            continue
        try:
            optimizer.step()
        except RuntimeError as error:
            found[name] = str(error)
    return found


def measure_loop(ranks: list[int], rounds: int) -> dict[str, dict[str, float]]:
    """By rank, milliseconds of one preconditioning of all gradients: PEFT's, with Cholesky, and changed."""
    found = {}
    for rank in ranks:
        layers = optimizer_step.adapter(optimizer_step.SHAPES["sd15"], rank, "cpu")
        pairs = riemannian._collect_lora_pairs(nn.ModuleDict({"layers": layers}))
        kinds = {"peft": riemannian._RiemannianPreconditioner, "cholesky": Cholesky, "changed": Changed}
        steps = {name: kind(pairs, REGS[-1]).step for name, kind in kinds.items()}
        times: dict[str, list[float]] = {name: [] for name in steps}
        gradients = [p.grad.clone() for pair in pairs for p in pair]
        for _ in range(1 + rounds):
            for name, step in steps.items():
                torch._foreach_copy_([p.grad for pair in pairs for p in pair], gradients)
                times[name].append(1e3 * optimizer_step.seconds(step, time.process_time, "cpu"))
        found[str(rank)] = {name: round(statistics.median(values[1:]), 2) for name, values in times.items()}
    return found


def main() -> None:
    """Parse the flags, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        "command": _machine.command("peft_riemannian.py"),
        "damping": measure_damping(given.seeds, given.steps),
        "kernels": measure_kernels(),
        "other_products": other_products(),
        "loop_ms": measure_loop(given.ranks, given.rounds),
        "machine": _machine.describe(1),
    }
    for name, row in found["damping"]["optimizers"].items():
        print(f"{name:14s} step of A {row['step_of_A']}  loss {row['loss']:.4f}")
    print(found["kernels"], found["other_products"], found["loop_ms"], sep="\n")
    print(f"wrote {_machine.write('peft_riemannian', found)}")


if __name__ == "__main__":
    _cli.start(main)
