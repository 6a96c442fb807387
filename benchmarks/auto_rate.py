"""How far from the best rate is what ``--learning_rate auto`` proposes?

    python benchmarks/auto_rate.py

A cell is a method, a subject of the embedded model and a rank. In each, runs as long as the last of --lengths are made
with constant rates a factor of two apart, until at every length the lowest eval/loss lies between two others; the best
rate is the lowest point of the parabola through these three. A run of every length is prepared with --learning_rate
auto, and its proposal compared: how many times the best rate it is ("times"), and which share of the best fall of the
loss its rate reaches, along a line between the rates that were run ("reached"). "exponent" is the power of the length
by which the best rate of the test's short runs would have to be divided to give the best of the run.

A method is written as for dreamlora compare: scaled_adamw:variant=split, adamw+lora_alpha=1. LoRA is on the attention
layers, with batches of 2 and without class images. Finished runs are kept in --runs, and finished cells in the results,
so that the command can be stopped and given again, or given for a few cells at a time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _cli
import _machine
import numpy as np

METHODS = ("adamw", "adamw+lora_units=start", "scaled_adamw", "lora_muon")
SUBJECTS = ("bannerfish", "twinhouse")
RANKS = (4, 32)
LENGTHS = (100, 300)
EVERY = 50
"""Steps between measurements; all lengths are multiples."""
FIRST = {"adamw": 2e-3, "adamw+lora_units=start": 8e-3, "scaled_adamw": 6e-3, "lora_muon": 0.09}
"""Where the search for the best rate begins; of other methods at the proposal."""
MOST = 9
"""Rates in a cell."""

Row = dict[str, Any]


def flags(cell: Row, steps: int, rate: str, folder: Path) -> list[str]:
    """The command line of ``dreamlora dreambooth`` for a run."""
    from dreamlora.config import RunConfig
    from dreamlora.sweep.plan import parse_entry

    words = (
        f"--learning_rate {rate} --seed 0 --output_dir {folder} --subject {cell['subject']} --rank {cell['rank']} "
        f"--max_train_steps {steps} --train_batch_size 2 --eval_steps {EVERY} "
        "--lora_layers to_q,to_k,to_v,to_out.0 --no_train_text_encoder --no_with_prior_preservation --sample_steps 0 "
        "--checkpointing_steps 0 --final_eval_items 0 --no_save_best --lr_scheduler constant --no_parity_check"
    ).split()
    return [*parse_entry(cell["method"], words, RunConfig).words, *words]


def make(cell: Row, steps: int, rate: str) -> Row:
    """Prepare a run, and make it unless it only finds its rate: its row."""
    from dreamlora.cli.parse import parse_run
    from dreamlora.errors import DivergedError
    from dreamlora.metric_names import EVAL_LOSS
    from dreamlora.run import assemble
    from dreamlora.training import loop

    with tempfile.TemporaryDirectory() as scratch:
        run = assemble.prepare(*parse_run(flags(cell, steps, rate, Path(scratch) / "run")))
        try:
            if rate == "auto":
                return run.folder.range_test()
            loop.train(run)
        except DivergedError:
            pass
        finally:
            run.folder.release()
        losses = {row["step"]: row["value"] for row in run.folder.metrics() if row["name"] == EVAL_LOSS}
    return {"losses": {str(step): loss for step, loss in losses.items()}}


class Runs:
    """Those that are made, in a file.

    Args:
        file: one row for each.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self._rows: dict[str, Row] = {row["key"]: row for row in map(json.loads, lines)}

    def get(self, cell: Row, steps: int, rate: str) -> Row:
        """The row of a run, which is made if it is not there."""
        key = f"{cell['method']} {cell['subject']} r{cell['rank']} {rate} {steps}"
        if key not in self._rows:
            self._rows[key] = {"key": key, **make(cell, steps, rate)}
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as output:
                output.write(json.dumps(self._rows[key]) + "\n")
            print(key, {name: self._rows[key].get(name) for name in ("losses", "learning_rate")}, flush=True)
        return self._rows[key]


def missing(losses: dict[int, dict[int, float]]) -> list[int]:
    """Powers of two around the first rate that are still to be run: the neighbours of the lowest at every length.

    Args:
        losses: by power and length.
    """
    if not losses:
        return [0]
    wanted: list[int] = []
    for length in next(iter(losses.values())):
        best = min(losses, key=lambda power: losses[power][length])
        wanted += [power for power in (best, best + 1, best - 1) if power not in losses]
    return list(dict.fromkeys(wanted))[: MOST - len(losses)]


def of_cell(cell: Row, lengths: Sequence[int], runs: Runs) -> list[Row]:
    """What was proposed and what is best, at every length."""
    from dreamlora.eval_loss.rates import vertex

    tests = {length: runs.get(cell, length, "auto") for length in lengths}
    first = FIRST.get(cell["method"], tests[lengths[-1]]["learning_rate"])
    losses: dict[int, dict[int, float]] = {}
    base = math.nan
    while powers := missing(losses):
        found = runs.get(cell, lengths[-1], f"{first * 2.0 ** powers[0]:.3g}")["losses"]
        base = found["0"]
        reached = {length: found.get(str(length)) for length in lengths}
        losses[powers[0]] = {length: math.inf if loss is None else loss for length, loss in reached.items()}
    rows = []
    for length in lengths:
        curve = {power: losses[power][length] for power in sorted(losses)}
        best, test = first * 2 ** vertex(curve), tests[length]
        reached = np.interp(
            math.log2(test["learning_rate"] / first), list(curve), [min(v, base) for v in curve.values()]
        )
        short = test["learning_rate"] * (length / test["steps"]) ** test["exponent"]
        rows.append(
            {
                **cell,
                "steps": length,
                "proposed": test["learning_rate"],
                "best": float(f"{best:.3g}"),
                "times": round(test["learning_rate"] / best, 3),
                "reached": round((base - float(reached)) / (base - min(curve.values())), 3),
                "exponent": round(math.log(short / best) / math.log(length / test["steps"]), 3),
                "runs": len(test["tried"]),
                "share": test["share"],
            }
        )
    return rows


def named(row: Row) -> tuple[Any, ...]:
    """What a row is about."""
    return row["subject"], row["rank"], row["method"], row["steps"]


def result(rows: Sequence[Row]) -> Row:
    """All rows, and the worst and the middle of them."""
    apart = [max(row["times"], 1 / row["times"]) for row in rows]
    return {
        "worst_factor": round(max(apart), 2),
        "median_factor": round(statistics.median(apart), 2),
        "worst_reached": min(row["reached"] for row in rows),
        "median_reached": round(statistics.median(row["reached"] for row in rows), 3),
        "median_exponent": round(statistics.median(row["exponent"] for row in rows), 3),
        "rows": sorted(rows, key=named),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, make the runs, print and write."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--subjects", nargs="+", default=SUBJECTS)
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS)
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help=f"ascending multiples of {EVERY}")
    parser.add_argument("--runs", type=Path, default=Path("outputs/auto_rate/runs.jsonl"), help="finished runs")
    parser.add_argument("--results", type=Path, default=_machine.RESULTS, help="folder of auto_rate.json")
    options = parser.parse_args(argv)
    lengths = list(options.lengths)
    if lengths != sorted(set(lengths)) or any(length < 1 or length % EVERY for length in lengths):
        parser.error(f"--lengths must be ascending multiples of {EVERY} (got {' '.join(map(str, lengths))})")
    torch.set_num_threads(1)
    runs, file = Runs(options.runs), options.results / "auto_rate.json"
    before = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    rows = {named(row): row for row in before}
    for subject, rank, method in itertools.product(options.subjects, options.ranks, options.methods):
        cell = {"method": method, "subject": subject, "rank": rank}
        for row in of_cell(cell, lengths, runs):
            rows[named(row)] = row
            print(" ".join(f"{name} {value}" for name, value in row.items()), flush=True)
        about = {"command": _machine.command("auto_rate.py"), **result(list(rows.values()))}
        _machine.write("auto_rate", {**about, "machine": _machine.describe(1)}, options.results)
    print(f"wrote {file}")


if __name__ == "__main__":
    _cli.start(main)
