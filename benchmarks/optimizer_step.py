"""Time of one optimizer step, next to torch's fused AdamW and PEFT's Riemannian preconditioner.

    python benchmarks/optimizer_step.py --shapes sd15 --rank 16 --threads 2

Prints medians and ratios, and writes them to benchmarks/results/. The optimizers take turns, so that a busy machine
slows all of them alike; --cpu_time counts the processor's time instead of the clock's (for one thread on a shared
machine).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from peft.optimizers import create_riemannian_optimizer
from torch import nn

from dreamlora.optimizers import ScaledAdamW, ScaledGD, lora_param_groups


def attention_shapes(widths: list[tuple[int, int]], text_width: int) -> list[tuple[int, int]]:
    """(out, in) of the eight projections of a self- and a cross-attention block, per width and number of blocks."""
    return [s for c, blocks in widths for _ in range(blocks) for s in [(c, c)] * 6 + [(c, text_width)] * 2]


SHAPES = {
    "sd15": attention_shapes([(320, 5), (640, 5), (1280, 6)], 768),  # Stable Diffusion 1.5: 128 pairs
    "sdxl": attention_shapes([(640, 10), (1280, 60)], 2048),  # SDXL: 560 pairs
    "tiny": attention_shapes([(32, 2), (64, 4), (128, 6)], 96),  # about the embedded model
}


def adapter(shapes: list[tuple[int, int]], rank: int, device: str) -> nn.Module:
    """Factors under PEFT's names, with gradients."""
    torch.manual_seed(0)
    layers = nn.ModuleList(
        nn.ModuleDict(
            {
                "lora_A": nn.ModuleDict({"default": nn.Linear(n, rank, bias=False)}),
                "lora_B": nn.ModuleDict({"default": nn.Linear(rank, m, bias=False)}),
            }
        )
        for m, n in shapes
    ).to(device)
    for p in layers.parameters():
        p.grad = 0.01 * torch.randn_like(p)
    return layers


def seconds(step: Callable[[], object], clock: Callable[[], float], device: str) -> float:
    start = clock()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=SHAPES, default="sd15")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--cpu_time", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    def model() -> nn.Module:
        return adapter(SHAPES[options.shapes], options.rank, options.device)

    optimizers = {
        "adamw (torch, fused)": torch.optim.AdamW(model().parameters(), lr=1e-4, fused=True),
        "scaled_adamw": ScaledAdamW(lora_param_groups(model()), lr=1e-4),
        "scaled_gd": ScaledGD(lora_param_groups(model()), lr=1e-4),
        "peft riemannian + AdamW": create_riemannian_optimizer(model(), torch.optim.AdamW, lr=1e-4),
    }
    clock = time.process_time if options.cpu_time else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for i in range(options.rounds + 3):
        for name, optimizer in optimizers.items():
            taken = seconds(optimizer.step, clock, options.device)
            if i >= 3:
                times[name].append(1e3 * taken)
    medians = {name: statistics.median(values) for name, values in times.items()}
    fused = medians["adamw (torch, fused)"]
    for name, value in medians.items():
        print(f"{name:26s} {value:8.2f} ms  {value / fused:6.2f} x fused AdamW")
    result = {
        "command": "python benchmarks/optimizer_step.py " + " ".join(sys.argv[1:]),
        "pairs": len(SHAPES[options.shapes]),
        "median_ms": medians,
        "fastest_ms": {name: min(values) for name, values in times.items()},
        "ratio_to_fused_adamw": {name: value / fused for name, value in medians.items()},
        "clock": "process" if options.cpu_time else "wall",
        "machine": torch.cuda.get_device_name() if options.device == "cuda" else platform.machine(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "peft": peft.__version__},
    }
    name = f"optimizer_step_{options.shapes}_r{options.rank}_{options.device}_{options.threads}threads.json"
    path = Path(__file__).parent / "results" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
