"""Does one learning rate do for every rank, alpha and initialisation? Scores of optimizers over cells of settings.

    python benchmarks/robustness.py --workers 2

A cell is a subject of the embedded model with a rank (1, 8, 64), an alpha (1, or the rank) and an initialisation
(kaiming, gaussian): six combinations, from the largest to the smallest start of lora_B's gradient. In every cell every
method trains with rates of its grid and seed 0; L_best of a cell is the lowest eval/loss (held-out images) that any of
these runs ended with. The score of a run that ended with loss L is

    (L_base - L) / (L_base - L_best),

1 for the best rate of the best method, 0 for nothing learnt. Each method's one rate is the one with the best worst cell
on --tuning_subject, of a grid of factors of 2 and then of two more beside the best. With that rate it trains in the
cells of --test_subject with --seeds that were not used before; a cell's score is that of the mean loss over the seeds,
and the result is the worst and the median cell. As L_best is picked among many runs of one seed, its luck counts
against all methods alike.

A method is an optimizer's name, with options of its own after a colon: scaled_adamw:variant=split,damping=0.01. Runs
are short: --steps steps with batches of --batch, LoRA on the denoiser's attention layers, no class images, and else the
preset of the embedded model. Finished runs are kept in --runs, so that the command can be stopped and given again; more
methods only cost their own runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import statistics
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import _machine
from tqdm import tqdm

SETTINGS = (
    (1, 1, "gaussian"),
    (1, 1, "kaiming"),
    (8, 8, "gaussian"),
    (8, 1, "kaiming"),
    (64, 64, "kaiming"),
    (64, 1, "gaussian"),
)
"""Rank, alpha, init. B's first gradient goes with (alpha / rank) * |lora_A|: 1 in the first, 1/4096 in the last."""
TARGET = 0.95
TUNING_SEED = 0
METHODS = {
    "adamw": 8e-3,
    "scaled_adamw": 8e-3,
    "lora_rite": 4e-3,
    "lora_muon:rank_power=0": 8e-2,
    "lora_muon": 0.18,
}
"""Method -> the middle of its grid of rates."""
STEP = 2.0
"""Between neighbours of a grid."""


@dataclass(frozen=True)
class Cell:
    """Settings that a person may choose without thinking of the learning rate."""

    subject: str
    rank: int
    alpha: int
    init: str

    def __str__(self) -> str:
        return f"{self.subject} r{self.rank} alpha{self.alpha} {self.init}"


@dataclass(frozen=True)
class Task:
    """One run to make."""

    cell: Cell
    method: str
    learning_rate: float
    seed: int
    steps: int
    batch: int

    @property
    def key(self) -> str:
        """Its name in the file of finished runs."""
        return f"{self.cell} {self.method} {self.learning_rate:.3g} seed{self.seed} {self.steps}x{self.batch}"


def cells(subject: str) -> list[Cell]:
    """All cells of a subject."""
    return [Cell(subject, *settings) for settings in SETTINGS]


def grid(middle: float, points: int) -> list[float]:
    """``points`` rates around ``middle``, a factor of two apart, of three digits."""
    return [float(f"{middle * STEP ** (k - points // 2):.3g}") for k in range(points)]


def beside(rate: float) -> list[float]:
    """The two rates half a step of the grid away, of three digits."""
    return [float(f"{rate * STEP**power:.3g}") for power in (-0.5, 0.5)]


def flags(task: Task, folder: Path) -> list[str]:
    """The command line of ``dreamlora dreambooth`` for a run."""
    optimizer, _, options = task.method.partition(":")
    words = (
        f"--optimizer {optimizer} --learning_rate {task.learning_rate} --seed {task.seed} --output_dir {folder} "
        f"--subject {task.cell.subject} --rank {task.cell.rank} --lora_alpha {task.cell.alpha} --init {task.cell.init} "
        f"--max_train_steps {task.steps} --train_batch_size {task.batch} --eval_steps {task.steps} "
        "--lora_layers to_q,to_k,to_v,to_out.0 --no_train_text_encoder --no_with_prior_preservation --sample_steps 0 "
        "--checkpointing_steps 0 --final_eval_items 0 --no_save_best"
    ).split()
    pairs = [part for pair in options.split(",") if pair for part in pair.split("=")]
    return [*words, *(["--optimizer_args", *pairs] if pairs else [])]


def work(task: Task) -> dict[str, Any]:
    """Make a run; its row: first and last eval/loss, infinite if it broke off because a value was not finite."""
    import torch

    from dreamlora import assemble, cli
    from dreamlora.errors import UserError
    from dreamlora.training import loop

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        run = assemble.prepare(*cli.parse_run(flags(task, Path(scratch) / "run")))
        try:
            loop.train(run)
        except UserError:
            if not any(row["name"] == "eval/loss" for row in run.folder.metrics()):
                raise
        values = {row["step"]: row["value"] for row in run.folder.metrics() if row["name"] == "eval/loss"}
        run.folder.release()
    last = values.get(task.steps)
    return {"key": task.key, **asdict(task), "base": values[0], "final": math.inf if last is None else last}


def make(tasks: Iterable[Task], file: Path, workers: int) -> dict[str, dict[str, Any]]:
    """Rows of all tasks by key: those that ``file`` has, and the others newly made and added to it."""
    tasks = list(tasks)
    rows = {row["key"]: row for row in map(json.loads, file.read_text().splitlines())} if file.exists() else {}
    missing = [task for task in tasks if task.key not in rows]
    file.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool, file.open("a") as output:
        futures = [pool.submit(work, task) for task in missing]
        for future in tqdm(as_completed(futures), total=len(tasks), initial=len(tasks) - len(missing), unit="run"):
            row = future.result()
            rows[row["key"]] = row
            output.write(json.dumps(row) + "\n")
            output.flush()
    return {task.key: rows[task.key] for task in tasks}


def best_losses(rows: Iterable[dict[str, Any]]) -> dict[Cell, float]:
    """L_best of every cell."""
    best: dict[Cell, float] = {}
    for row in rows:
        cell = Cell(**row["cell"])
        best[cell] = min(best.get(cell, math.inf), row["final"])
    return best


def score(base: float, loss: float, best: float) -> float:
    """(L_base - L) / (L_base - L_best); minus infinity for a run that broke off."""
    return (base - loss) / (base - best)


def rate_scores(rows: list[dict[str, Any]], method: str, best: dict[Cell, float]) -> dict[float, list[float]]:
    """Scores of a method's runs over the cells, by learning rate."""
    found: dict[float, list[float]] = {}
    for row in rows:
        if row["method"] == method:
            value = score(row["base"], row["final"], best[Cell(**row["cell"])])
            found.setdefault(row["learning_rate"], []).append(value)
    return found


def tuned_scores(by_rate: dict[float, list[float]]) -> list[float]:
    """Score of the best rate of every cell: what tuning cell by cell would give."""
    return [max(values) for values in zip(*by_rate.values(), strict=True)]


def choose_rate(by_rate: dict[float, list[float]]) -> float:
    """The rate with the best worst cell."""
    return max(by_rate, key=lambda rate: min(by_rate[rate]))


def cell_scores(rows: list[dict[str, Any]], method: str, best: dict[Cell, float]) -> dict[str, float]:
    """Score of the mean loss over the seeds, by cell."""
    losses: dict[Cell, list[dict[str, Any]]] = {}
    for row in rows:
        if row["method"] == method:
            losses.setdefault(Cell(**row["cell"]), []).append(row)
    return {
        str(cell): score(found[0]["base"], statistics.fmean(row["final"] for row in found), best[cell])
        for cell, found in losses.items()
    }


def result(tuning: list[dict[str, Any]], sweep: list[dict[str, Any]], test: list[dict[str, Any]]) -> dict[str, Any]:
    """Per method: its rate, and worst, median and all scores on the test subject; those of its whole grid; and, on the
    tuning subject, worst and median cell if every cell had its own best rate.

    Args:
        tuning: the grids on the tuning subject.
        sweep: rates around the chosen ones on the test subject, for L_best alone.
        test: runs on the test subject with the chosen rates and fresh seeds.
    """
    best_tuning, best_test = best_losses(tuning), best_losses(sweep)
    methods = {}
    for method in dict.fromkeys(row["method"] for row in test):
        by_rate = rate_scores(tuning, method, best_tuning)
        tuned = tuned_scores(by_rate)
        scores = cell_scores(test, method, best_test)
        methods[method] = {
            "learning_rate": choose_rate(by_rate),
            "worst": round(min(scores.values()), 4),
            "worst_cell": min(scores, key=lambda cell: scores[cell]),
            "median": round(statistics.median(scores.values()), 4),
            "cells": {cell: round(value, 4) for cell, value in scores.items()},
            "tuned_worst": round(min(tuned), 4),
            "tuned_median": round(statistics.median(tuned), 4),
            "tuning_worst_by_rate": {rate: round(min(values), 4) for rate, values in sorted(by_rate.items())},
            "tuning_median_by_rate": {
                rate: round(statistics.median(values), 4) for rate, values in sorted(by_rate.items())
            },
            "test_worst_by_rate": {
                rate: round(min(values), 4) for rate, values in sorted(rate_scores(sweep, method, best_test).items())
            },
        }
    winner = max(methods, key=lambda method: methods[method]["worst"])
    return {"best": winner, "passed": methods[winner]["worst"] >= TARGET, "target": TARGET, "methods": methods}


def main() -> None:
    """Parse the flags, make the runs, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--methods", nargs="+", default=[f"{name}@{rate:g}" for name, rate in METHODS.items()],
        help="optimizer[:option=value,...][@middle of its grid of rates]",
    )  # fmt: skip
    parser.add_argument("--tuning_subject", default="checkerling")
    parser.add_argument("--test_subject", default="bannerfish")
    parser.add_argument("--points", type=int, default=5, help="rates in a tuning grid")
    parser.add_argument("--test_points", type=int, default=3, help="rates tried around the chosen one for L_best")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the runs that are reported")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--workers", type=int, default=_machine.usable_cores())
    parser.add_argument("--runs", type=Path, default=Path("outputs/robustness/runs.jsonl"), help="finished runs")
    parser.add_argument("--results", type=Path, default=_machine.RESULTS, help="folder of robustness.json")
    options = parser.parse_args()
    if TUNING_SEED in options.seeds:
        parser.error(f"--seeds must not hold {TUNING_SEED}, the seed of the tuning runs")
    middles = dict(read_method(word) for word in options.methods)

    def made(subject: str, rates: dict[str, list[float]], seeds: list[int]) -> list[dict[str, Any]]:
        tasks = [
            Task(cell, method, rate, seed, options.steps, options.batch)
            for cell, method in itertools.product(cells(subject), rates)
            for rate in rates[method]
            for seed in seeds
        ]
        return list(make(tasks, options.runs, options.workers).values())

    grids = {method: grid(middle, options.points) for method, middle in middles.items()}
    tuning = made(options.tuning_subject, grids, [TUNING_SEED])
    best = best_losses(tuning)
    finer = {method: beside(choose_rate(rate_scores(tuning, method, best))) for method in middles}
    tuning += made(options.tuning_subject, finer, [TUNING_SEED])
    best = best_losses(tuning)
    chosen = {method: choose_rate(rate_scores(tuning, method, best)) for method in middles}
    around = {method: grid(rate, options.test_points) for method, rate in chosen.items()}
    sweep = made(options.test_subject, around, [TUNING_SEED])
    test = made(options.test_subject, {method: [rate] for method, rate in chosen.items()}, options.seeds)
    found = {
        "command": _machine.command("robustness.py"),
        "settings": {
            name: getattr(options, name)
            for name in ("tuning_subject", "test_subject", "points", "test_points", "seeds", "steps", "batch")
        },
        "runs": len(tuning) + len(sweep) + len(test),
        **result(tuning, sweep, test),
        "machine": _machine.describe(1),
    }
    for method, row in sorted(found["methods"].items(), key=lambda item: -item[1]["worst"]):
        print(f"{method:60s} lr {row['learning_rate']:<8g} worst {row['worst']:7.3f}  median {row['median']:6.3f}")
    print(f"wrote {_machine.write('robustness', found, options.results)}")


def read_method(word: str) -> tuple[str, float]:
    """``name:options@rate`` -> method and the middle of its grid; without a rate, that of METHODS."""
    method, _, rate = word.partition("@")
    if not rate and method not in METHODS:
        raise SystemExit(f"--methods {word}: give the middle of its grid of learning rates, as in {word}@1e-3")
    return method, float(rate) if rate else METHODS[method]


if __name__ == "__main__":
    main()
