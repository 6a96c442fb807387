"""Does one learning rate do for every rank, alpha and initialisation? Scores of optimizers over cells of settings.

    python benchmarks/robustness.py --workers 2

A cell is a subject of the embedded model with a rank (1, 8, 64), an alpha (1, or the rank) and an initialisation
(kaiming, gaussian): six combinations, from the largest to the smallest start of lora_B's gradient. The score of a
method that reaches the loss L (eval/loss on held-out images, mean over the seeds) in a cell is

    (L_base - L) / (L_base - L_best),

1 for the best method with the best of its rates in that cell, 0 for nothing learnt.

Tuning, on --tuning_subject with one seed: every method runs in all cells with a grid of rates a factor of two apart,
which is made longer until the best rate is not at its end, and then with the two rates half a step beside the best. A
method's one rate is the one with the best worst cell. The method with the best worst cell is the one to judge ("best").

Test, on --test_subject with --seeds that were not used before: every method runs with its one rate, and with the rates
around it, so that L_best is known there: the lowest mean over the seeds that any method reached with any rate. The
result is the worst and the median cell of each method with its one rate.

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
import os
import statistics
import tempfile
import threading
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
    "adamw": 4e-3,
    "scaled_adamw": 8e-3,
    "scaled_adamw:variant=split,scale_correction=true": 8e-3,
    "lora_rite": 4e-3,
    "lora_muon": 0.18,
}
"""Method -> the middle of its first rates."""
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
    return [three_digits(middle * STEP ** (k - points // 2)) for k in range(points)]


def longer(rates: list[float], best: float) -> float | None:
    """The next rate of a grid whose best is at an end; None if it is not."""
    ordered = sorted(rates)
    beyond = {ordered[0]: ordered[0] / STEP, ordered[-1]: ordered[-1] * STEP}.get(best)
    return None if beyond is None else three_digits(beyond)


def beside(rate: float) -> list[float]:
    """The two rates half a step of the grid away."""
    return [three_digits(rate * STEP**power) for power in (-0.5, 0.5)]


def three_digits(rate: float) -> float:
    """As runs are named by it."""
    return float(f"{rate:.3g}")


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

    from dreamlora.cli.parse import parse_run
    from dreamlora.errors import UserError
    from dreamlora.metric_names import EVAL_LOSS
    from dreamlora.run import assemble
    from dreamlora.training import loop

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        run = assemble.prepare(*parse_run(flags(task, Path(scratch) / "run")))
        try:
            loop.train(run)
        except UserError:
            if not any(row["name"] == EVAL_LOSS for row in run.folder.metrics()):
                raise
        values = {row["step"]: row["value"] for row in run.folder.metrics() if row["name"] == EVAL_LOSS}
        run.folder.release()
    last = values.get(task.steps)
    return {"key": task.key, **asdict(task), "base": values[0], "final": math.inf if last is None else last}


def end_with_parent() -> None:
    """Called in a worker: whoever kills the program that started it means the runs too."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def make(tasks: Iterable[Task], file: Path, workers: int) -> dict[str, dict[str, Any]]:
    """Rows of all tasks by key: those that ``file`` has, and the others newly made and added to it."""
    tasks = list(tasks)
    rows = (
        {row["key"]: row for row in map(json.loads, file.read_text(encoding="utf-8").splitlines())}
        if file.exists()
        else {}
    )
    missing = [task for task in tasks if task.key not in rows]
    file.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(workers, mp_context=context, initializer=end_with_parent) as pool,
        file.open("a", encoding="utf-8") as output,
    ):
        futures = [pool.submit(work, task) for task in missing]
        for future in tqdm(as_completed(futures), total=len(tasks), initial=len(tasks) - len(missing), unit="run"):
            row = future.result()
            rows[row["key"]] = row
            output.write(json.dumps(row) + "\n")
            output.flush()
    return {task.key: rows[task.key] for task in tasks}


def mean_losses(rows: Iterable[dict[str, Any]]) -> dict[Cell, dict[tuple[str, float], float]]:
    """Loss at the end, mean over the seeds, by cell and (method, rate); infinite if a run broke off."""
    found: dict[Cell, dict[tuple[str, float], list[float]]] = {}
    for row in rows:
        key = (row["method"], row["learning_rate"])
        found.setdefault(Cell(**row["cell"]), {}).setdefault(key, []).append(row["final"])
    return {cell: {key: statistics.fmean(values) for key, values in each.items()} for cell, each in found.items()}


def scores(rows: list[dict[str, Any]]) -> dict[tuple[str, float], dict[Cell, float]]:
    """(L_base - L) / (L_base - L_best) by (method, rate) and cell; L_best is the lowest loss in the cell.

    Minus infinity for a run that broke off.
    """
    base = {Cell(**row["cell"]): row["base"] for row in rows}
    table: dict[tuple[str, float], dict[Cell, float]] = {}
    for cell, losses in mean_losses(rows).items():
        gain = base[cell] - min(losses.values())
        for key, loss in losses.items():
            table.setdefault(key, {})[cell] = (base[cell] - loss) / gain
    return table


def of_method(table: dict[tuple[str, float], dict[Cell, float]], method: str) -> dict[float, dict[Cell, float]]:
    """The scores of a method by rate."""
    return {rate: cells for (name, rate), cells in sorted(table.items()) if name == method}


def choose_rate(by_rate: dict[float, dict[Cell, float]]) -> float:
    """The rate with the best worst cell."""
    return max(by_rate, key=lambda rate: min(by_rate[rate].values()))


def result(tuning: list[dict[str, Any]], test: list[dict[str, Any]]) -> dict[str, Any]:
    """Per method: its rate; worst, median and all cells on the test subject; worst and median cell by rate on both
    subjects; and of the best rate of every single cell ("tuned"), which is what tuning cell by cell would give."""
    tuned, tested = scores(tuning), scores(test)
    methods = {}
    for method in dict.fromkeys(row["method"] for row in test):
        by_rate, on_test = of_method(tuned, method), of_method(tested, method)
        rate = choose_rate(by_rate)
        final = on_test[rate]
        cell_by_cell = [max(each[cell] for each in on_test.values()) for cell in final]
        methods[method] = {
            "learning_rate": rate,
            "worst": round(min(final.values()), 4),
            "worst_cell": str(min(final, key=lambda cell: final[cell])),
            "median": round(statistics.median(final.values()), 4),
            "cells": {str(cell): round(value, 4) for cell, value in final.items()},
            "tuned_worst": round(min(cell_by_cell), 4),
            "tuned_median": round(statistics.median(cell_by_cell), 4),
            "tuning_worst_by_rate": {rate: round(min(each.values()), 4) for rate, each in by_rate.items()},
            "tuning_median_by_rate": {
                rate: round(statistics.median(each.values()), 4) for rate, each in by_rate.items()
            },
            "test_worst_by_rate": {rate: round(min(each.values()), 4) for rate, each in on_test.items()},
        }
    best = max(methods, key=lambda method: max(methods[method]["tuning_worst_by_rate"].values()))
    return {"best": best, "passed": methods[best]["worst"] >= TARGET, "target": TARGET, "methods": methods}


def main() -> None:
    """Parse the flags, make the runs, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--methods", nargs="+", default=[f"{name}@{rate:g}" for name, rate in METHODS.items()],
        help="optimizer[:option=value,...][@middle of its first rates]",
    )  # fmt: skip
    parser.add_argument("--tuning_subject", default="checkerling")
    parser.add_argument("--test_subject", default="bannerfish")
    parser.add_argument("--points", type=int, default=3, help="rates in a tuning grid at first")
    parser.add_argument("--test_points", type=int, default=3, help="rates tried around the chosen one")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the test runs")
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
    while True:
        tuning = made(options.tuning_subject, grids, [TUNING_SEED])
        chosen = {method: choose_rate(of_method(scores(tuning), method)) for method in middles}
        more = {method: longer(grids[method], rate) for method, rate in chosen.items()}
        if not any(more.values()):
            break
        grids = {method: [*rates, *filter(None, [more[method]])] for method, rates in grids.items()}
    tuning += made(options.tuning_subject, {m: beside(rate) for m, rate in chosen.items()}, [TUNING_SEED])
    chosen = {method: choose_rate(of_method(scores(tuning), method)) for method in middles}
    around = {method: grid(rate, options.test_points) for method, rate in chosen.items()}
    test = made(options.test_subject, around, options.seeds)
    found = {
        "command": _machine.command("robustness.py"),
        "settings": {
            name: getattr(options, name)
            for name in ("tuning_subject", "test_subject", "points", "test_points", "seeds", "steps", "batch")
        },
        "runs": len(tuning) + len(test),
        **result(tuning, test),
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
