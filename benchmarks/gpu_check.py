"""All that must hold on a GPU, in a few minutes: the tests that need one, and the time of a training step.

    python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --device cpu --quick        # tries the program where there is no GPU
    python benchmarks/gpu_check.py --table results/gpu_check_h100_80gb_hbm3.json

Runs the tests marked "gpu". Then measures the step of SD 1.5 (512 pixels, batch 4) and SDXL (1024 pixels, batch 1, with
gradient checkpointing) in bf16 with every optimizer of ``optimizer_step.py``, with the fused layer and with PEFT's, at
ranks 4, 16 and 64; and each optimizer alone. Weights are random, so nothing is downloaded. What is not begun within
--minutes is left out and named. One file, results/gpu_check_<card>.json; status 1 if anything failed.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import _cli
import _gpu_tier
import _machine
import _whole_step
import optimizer_step
import torch
from optimizer_step import FUSED

CASES = ["sd15/16", "sdxl/16", "sd15/4", "sdxl/4", "sd15/64", "sdxl/64"]
"""The most telling ones first, for the case that time runs out."""
QUICK_CASES = ["tiny/4"]
TIER_SHARE = 0.6
"""Of the time, at most, for the tests."""
ROW_S = 25.0
"""So long a row is thought to take until one has taken longer."""


Row = tuple[str, str, Callable[[], dict[str, Any]]]
"""Part of the result, case, and what measures it."""


def rows(device: str, cases: Iterable[str], rounds: int) -> list[Row]:
    """All measurements, in order."""
    alone = functools.partial(optimizer_step.measure, device=device, rounds=rounds, clock=time.perf_counter)
    whole = functools.partial(_whole_step.measure, device=device, rounds=rounds)
    parts = {"whole_step": whole, "optimizer_step": alone}
    return [(part, case, functools.partial(make, case)) for case in cases for part, make in parts.items()]


def measured(rows: Iterable[Row], end: float) -> dict[str, Any]:
    """``whole_step`` and ``optimizer_step`` by case, and why what is missing is (``left_out``, ``failed``).

    Args:
        end: by ``time.monotonic``; nothing is begun that would not be ready by then.
    """
    found: dict[str, dict[str, Any]] = {"whole_step": {}, "optimizer_step": {}, "left_out": {}, "failed": {}}
    longest = ROW_S
    for part, case, measure in rows:
        started = time.monotonic()
        if started + longest > end:
            found["left_out"][f"{part} {case}"] = "no time was left"
            continue
        try:
            found[part][case] = measure()
        except Exception as error:  # what the others have measured is written all the same
            found["failed"][f"{part} {case}"] = f"{type(error).__name__}: {str(error)[:500]}"
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        taken = time.monotonic() - started
        longest = max(longest, taken)
        print(f"{part:14s} {case:8s} {taken:6.1f} s  {found['failed'].get(f'{part} {case}', '')}", flush=True)
    return found


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: what was tested, and tables of the whole step and of the optimizer alone."""
    counts = result["tier"]["counts"]
    tests = ", ".join(f"{counts.get(outcome, 0)} {outcome}" for outcome in ("passed", "failed", "skipped"))
    on = result["card"]
    software = f"torch {result['machine']['versions']['torch']}" + (
        f", driver {on['driver']}" if "driver" in on else ""
    )
    head = f"**{on['name']}** ({software}): {tests} of the GPU tests, in {result['tier']['seconds']:.0f} s."
    grids = [
        _grid(title, result[part])
        for title, part in (("Whole step, bf16", "whole_step"), ("Optimizer alone", "optimizer_step"))
        if result[part]
    ]
    return "\n\n".join([head, *grids])


def _grid(title: str, cases: dict[str, dict[str, Any]]) -> str:
    """Milliseconds of fused AdamW; of the other rows, how many times that."""
    ordered = sorted(cases, key=lambda case: (case.split("/")[0], int(case.split("/")[1])))
    lines = [[title, *ordered], ["---"] * (len(ordered) + 1)]
    for name in cases[ordered[0]]["optimizers"]:
        of = [cases[case]["optimizers"][name] for case in ordered]
        cells = [f"{one['median_ms']:.1f} ms" if name == FUSED else f"{one['times_fused_adamw']:.2f} ×" for one in of]
        lines.append([name, *cells])
    memory = [cases[case].get("step_mib", {}) for case in ordered]
    if all(one.get("fused") for one in memory):
        lines.append(["memory of the step", *(f"{one['fused']:,} MiB" for one in memory)])
        lines.append(["memory, PEFT's layer", *(f"{one['peft'] / one['fused']:.2f} ×" for one in memory)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    """Parse the flags, test, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="one small case, few rounds: whether the program works")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=Path, default=_machine.RESULTS, help="folder of the file")
    parser.add_argument("--table", type=Path, help="print the Markdown table of such a file, and do nothing else")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(options.table.read_text(encoding="utf-8"))))
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --device cpu --quick tries the program without one")
    end = time.monotonic() + 60 * options.minutes
    tier = _gpu_tier.run(options.device, TIER_SHARE * 60 * options.minutes, options.quick)
    cases, rounds = (QUICK_CASES, 1) if options.quick else (CASES, options.rounds)
    found = measured(rows(options.device, cases, rounds), end)
    result = {
        "command": _machine.command("gpu_check.py"),
        "card": _machine.card(options.device),
        "tier": tier,
        "target": optimizer_step.judged(found["optimizer_step"], options.device),
        **found,
        "seconds": round(time.monotonic() - end + 60 * options.minutes, 1),
        "machine": _machine.describe(torch.get_num_threads()),
    }
    file = _machine.write(_machine.file_name("gpu_check", result["card"]["name"]), result, options.results)
    print(f"{table(result)}\n\nwrote {file}")
    sys.exit(1 if tier["status"] != 0 or found["failed"] else 0)


if __name__ == "__main__":
    _cli.start(main)
