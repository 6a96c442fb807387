"""Time of one optimizer step over the LoRA pairs of real models: ours, torch's AdamW, PEFT's Riemannian preconditioner.

    python benchmarks/optimizer_step.py --threads 2
    python benchmarks/optimizer_step.py --device cuda --cases sdxl/16

A case is a model and a rank. All optimizers of a case work on the same factors and gradients and take turns, so that a
busy machine slows all of them alike; the figure is the median over the rounds, and what counts is its ratio to fused
AdamW. LoRA-RITE and LoRA-Muon do more in every fourth step than in the others: of them it is the mean of the medians of
the four, as after their first steps (in which they do it always). --cpu_time counts the processor's time instead of the
clock's (for one thread on a shared machine).
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import _cli
import _machine
import torch
from peft.optimizers import create_riemannian_optimizer
from torch import nn
from torch.optim import AdamW, Optimizer

from dreamlora.optimizers import LoRAMuon, LoRARITE, LoRATSD, ScaledAdamW, ScaledGD, in_units, lora_param_groups
from dreamlora.optimizers._refresh import REFRESHED_EACH


def attention_shapes(widths: list[tuple[int, int]], text_width: int) -> list[tuple[int, int]]:
    """(out, in) of the eight projections of a self- and a cross-attention block, per width and number of blocks."""
    return [s for c, blocks in widths for _ in range(blocks) for s in [(c, c)] * 6 + [(c, text_width)] * 2]


SHAPES = {
    "tiny": attention_shapes([(32, 2), (64, 4), (128, 6)], 96),  # about the embedded model
    "sd15": attention_shapes([(320, 5), (640, 5), (1280, 6)], 768),  # Stable Diffusion 1.5: 128 pairs
    "sdxl": attention_shapes([(640, 10), (1280, 60)], 2048),  # SDXL: 560 pairs
    "flux": [(3072, 3072)] * 266,  # FLUX.1: projections of 19 double (8 each) and 38 single blocks (3 each)
}
CASES = [f"{model}/{rank}" for model in ("sd15", "sdxl", "flux") for rank in (4, 16, 64)]
FUSED, PEFT = "adamw (torch, fused)", "riemannian (peft)"
OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    FUSED: lambda m: AdamW(m.parameters(), lr=1e-4, fused=True),
    "adamw (torch, foreach)": lambda m: AdamW(m.parameters(), lr=1e-4, foreach=True),
    "adamw, units of the start": lambda m: in_units(AdamW(lora_param_groups(m, units="start"), lr=1e-4, fused=True)),
    "scaled_gd": lambda m: ScaledGD(lora_param_groups(m), lr=1e-4),
    "scaled_adamw": lambda m: ScaledAdamW(lora_param_groups(m), lr=1e-4),
    "scaled_adamw, split": lambda m: ScaledAdamW(lora_param_groups(m), lr=1e-4, variant="split"),
    "lora_rite": lambda m: LoRARITE(lora_param_groups(m), lr=1e-4),
    "lora_muon": lambda m: LoRAMuon(lora_param_groups(m), lr=1e-4),
    "lora_tsd": lambda m: LoRATSD(lora_param_groups(m), lr=1e-4),
    PEFT: lambda m: create_riemannian_optimizer(m, AdamW, lr=1e-4),
}
WARM_UP = 2
PERIOD = 4
"""Steps until what an optimizer does comes again."""
TARGETS = {
    "cpu": [
        ("scaled_adamw", "sd15/16", FUSED, 3.0),
        ("scaled_adamw", "sd15/16", PEFT, 1 / 3),
        *(
            ("lora_muon", f"{model}/{rank}", FUSED, most)
            for model in ("sd15", "sdxl")
            for rank, most in ((16, 5.0), (64, 12.0))
        ),
    ],
    "cuda": [
        ("scaled_adamw", "sdxl/16", FUSED, 2.0),
        ("scaled_adamw", "sdxl/16", PEFT, 1 / 30),
        ("lora_muon", "sdxl/16", FUSED, 2.5),
        ("lora_muon", "sdxl/64", FUSED, 3.0),
    ],
}
"""Optimizer, case, and the most that its step may take of the time of another."""


def adapter(shapes: list[tuple[int, int]], rank: int, device: str) -> nn.Module:
    """Factors under PEFT's names, with gradients."""
    torch.manual_seed(0)
    layers = nn.ModuleList(
        nn.ModuleDict(
            {
                "lora_A": nn.ModuleDict({"default": nn.Linear(n, rank, bias=False, device=device)}),
                "lora_B": nn.ModuleDict({"default": nn.Linear(rank, m, bias=False, device=device)}),
            }
        )
        for m, n in shapes
    )
    for p in layers.parameters():
        p.grad = 0.01 * torch.randn_like(p)
    return layers


def seconds(step: Callable[[], object], clock: Callable[[], float], device: str) -> float:
    """Time of one call, with what it left to do on the GPU."""
    start = clock()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def measure(case: str, device: str, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Typical and smallest time in ms, and ratio to fused AdamW, of every optimizer, over whole periods."""
    model, rank = case.split("/")
    layers = adapter(SHAPES[model], int(rank), device)
    optimizers = {name: make(layers) for name, make in OPTIMIZERS.items()}
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for number in range(WARM_UP + PERIOD * -(-rounds // PERIOD)):
        for name, optimizer in optimizers.items():
            if number == WARM_UP:
                settle(optimizer)
            times[name].append(1e3 * seconds(optimizer.step, clock, device))
    times = {name: values[WARM_UP:] for name, values in times.items()}
    return {"pairs": len(SHAPES[model]), "optimizers": ratios(times)}


def settle(optimizer: Optimizer) -> None:
    """Go on as after the first steps, in which LoRA-RITE and LoRA-Muon make all their matrices anew."""
    for group in optimizer.param_groups:
        if "refresh" in group:
            group["steps"] = REFRESHED_EACH


def typical(values: list[float]) -> float:
    """The mean of the medians of the steps of a period, which need not be alike."""
    return statistics.mean(statistics.median(values[i::PERIOD]) for i in range(min(PERIOD, len(values))))


def ratios(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """By optimizer: typical and smallest ms, and how many times fused AdamW's typical time that is."""
    medians = {name: typical(values) for name, values in times.items()}
    return {
        name: {
            "median_ms": round(value, 3),
            "fastest_ms": round(min(times[name]), 3),
            "times_fused_adamw": round(value / medians[FUSED], 3),
        }
        for name, value in medians.items()
    }


def judged(cases: dict[str, Any], device: str) -> list[dict[str, Any]]:
    """Which targets are met, of those whose case was measured."""
    rows = []
    for name, case, other, wanted in TARGETS[device]:
        if case in cases:
            found = cases[case]["optimizers"]
            ratio = found[name]["median_ms"] / found[other]["median_ms"]
            row = {"optimizer": name, "case": case, "of": other, "found": round(ratio, 3), "wanted": round(wanted, 3)}
            rows.append({**row, "passed": ratio <= wanted})
    return rows


def main() -> None:
    """Parse the flags, measure case by case, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, help="model/rank; models: " + ", ".join(SHAPES))
    parser.add_argument("--threads", type=int, default=_machine.usable_cores())
    parser.add_argument("--device", choices=TARGETS, default="cpu")
    parser.add_argument("--rounds", type=int, default=16, help="rounded up to whole periods of steps")
    parser.add_argument("--cpu_time", action="store_true")
    options = parser.parse_args()
    for case in options.cases:
        model, _, rank = case.partition("/")
        if model not in SHAPES or not rank.isdigit():
            parser.error(f"--cases {case}: give model/rank, as in sd15/16; models: {', '.join(SHAPES)}")
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    cases = {}
    for case in options.cases:
        cases[case] = measure(case, options.device, options.rounds, clock)
        gc.collect()
        for name, row in cases[case]["optimizers"].items():
            print(f"{case:8s} {name:24s} {row['median_ms']:10.2f} ms {row['times_fused_adamw']:8.2f} x fused AdamW")
    found = {
        "command": _machine.command("optimizer_step.py"),
        "clock": "process" if options.cpu_time else "wall",
        "target": judged(cases, options.device),
        "cases": cases,
        "machine": _machine.describe(options.threads),
    }
    print(f"wrote {_machine.write(f'optimizer_step_{options.device}', found)}")


if __name__ == "__main__":
    _cli.start(main)
