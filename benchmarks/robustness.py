"""Does one learning rate do for every rank, alpha and start? Optimizers with the same budget of tuning, held out.

    python benchmarks/robustness.py --model tiny --plan
    python benchmarks/robustness.py --model tiny
    python benchmarks/robustness.py --model tiny-flow

A cell is a subject of the embedded model with settings that a person may choose without thinking of the learning rate:
rank, alpha, start, layers, steps, weight decay. Twelve cells stand for the 3 · 2^5 = 96 combinations (``CELLS``).

1. Tuning, on --tuning_subject with one seed, in the cells of ``TUNING``: every method with grids of rates a factor of
   two apart, each with two settings of its momentum or betas. Grids grow until no optimum lies at an edge, neither that
   of a single cell nor that of the worst cell; then come the two rates half a step beside the best. A method's one
   setting and rate are those with the best worst cell, counted in the gain that AdamW's best has there.
2. Test, on three other subjects with five other seeds: every method with its one setting and rate.
3. In every cell by itself: every method with rates around its own, on until the best is inside; one seed. What leads
   in a cell is trained with all seeds. So L_best of a cell is the lowest mean loss of any method, frozen or tuned
   there.
4. In the same time: what costs more (or less) time per step than AdamW gets the steps that fit into AdamW's seconds,
   one seed. A step's cost here is that of a very small model, in which optimizers weigh more than in a large one.

The score of a cell is (L_base - L) / (L_base - L_best), L the mean over the seeds; a method's result is its worst cell,
with the interval of a bootstrap over the seeds, which are paired between methods and drawn together for all cells.
Verdicts against AdamW are in the words of ``dreamlora compare``.

What the word "all" of layers means: a UNet's linear layers and convolutions; all linear layers of a flow transformer,
which has no convolutions.

Finished trainings are kept in --runs, which are committed: the same command goes on, or makes the committed result from
them in seconds, and more methods cost their own trainings alone. After a change of a method's step, delete its rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import _cli
import _machine
from _robustness import LAYERS, Bench, Cell, Config, Method
from _robustness_protocol import SAME_SPEED, Effort, test, tune
from _robustness_report import result, table

from dreamlora import tiny

RESULT, RUNS = "robustness_fair", "robustness_runs"
ADAM = ("betas=0.9,0.999", "betas=0.7,0.9")
START = "+lora_units=start"
METHODS = (
    Method("adamw", ADAM, 4e-3),
    Method(f"adamw{START}", ADAM, 1.6e-2),
    Method(f"adamw{START}", ADAM, None),
    Method("adamw8bit", ADAM, 4e-3),
    Method("lion", ("betas=0.9,0.99", "betas=0.7,0.9"), 1e-3),
    Method("prodigy", ADAM, 1.0),
    Method(f"prodigy{START}", ADAM, 1.0),
    Method("lora_plus", ADAM, 1e-3),
    Method("scaled_adamw", ADAM, 8e-3),
    Method(f"scaled_adamw{START}", ADAM, 1.6e-2),
    Method("scaled_adamw:variant=split,scale_correction=true", ADAM, 4e-3),
    Method("peft_riemannian", ADAM, 8e-3),
    Method("lora_rite:rank_power=0.25", ADAM, 1.1e-2),
    Method("lora_muon:layer_power=0,rank_power=0,trust=0", ("momentum=0.95", "momentum=0.9"), 0.1),
    Method("lora_muon:layer_power=0", ("momentum=0.9", "momentum=0.7"), 0.18),
    Method("lora_muon", ("momentum=0.9", "momentum=0.7"), 0.18),
    Method("lora_tsd", ("momentum=0.9", "momentum=0.7"), 0.1),
)
"""The baseline first. Middles are where grids begin; they grow. Two settings for everybody: the usual memory, and a
shorter one."""

HELD_OUT = ("bannerfish", "twinhouse", "facebloom")
TUNING = (
    (4, None, "gaussian", "all", 100, None),
    (64, 1, "gaussian", "attention", 100, 0.0),
    (64, None, "kaiming", "attention", 300, None),
)
"""Rank, alpha, start, layers, steps, weight decay. Both ends of everything, and of what alpha and the start do to B's
first gradient, which goes with alpha / rank * |A|: the second and the third."""
CELLS = (
    ("facebloom", 4, 1, "gaussian", "attention", 100, 0.0),
    ("bannerfish", 4, 1, "kaiming", "attention", 300, None),
    ("twinhouse", 4, None, "kaiming", "all", 300, 0.0),
    ("bannerfish", 4, None, "gaussian", "all", 100, None),
    ("facebloom", 16, 1, "gaussian", "all", 300, None),
    ("bannerfish", 16, 1, "kaiming", "all", 100, 0.0),
    ("twinhouse", 16, None, "gaussian", "attention", 100, None),
    ("facebloom", 16, None, "kaiming", "attention", 100, 0.0),
    ("twinhouse", 64, 1, "kaiming", "attention", 100, None),
    ("bannerfish", 64, None, "gaussian", "attention", 300, 0.0),
    ("twinhouse", 64, 1, "gaussian", "all", 100, 0.0),
    ("facebloom", 64, None, "kaiming", "all", 100, None),
)
"""An orthogonal array of strength 2, OA(12, 3·2^4), over rank, alpha, start, layers and decay: any two of these five
have all their combinations, each equally often. Steps (8 cells of 100, 4 of 300, which are three times as dear) and the
three subjects (4 cells each) are laid upon it so that they, too, meet every level of everything else at least once.
Whatever two settings together make a rate wrong, there is a cell that has them; and a mean over cells of one level
differs from that of another by nothing else. What three settings do only together could be missed: rank 64 in all
layers for 300 steps is left out for its price."""

BATCH = 2
FULL = Effort(points=3, grows=True, seeds=(1, 2, 3, 4, 5))
QUICK = Effort(points=1, grows=False, seeds=(1, 2))
QUICK_METHODS = ("adamw", "lora_muon")
TIMED_STEPS = 8
"""Of a training whose only purpose is its time."""
GROWTH = {"grown": 1.5, "searched": 2.5, "leaders": 1.0}
"""What --plan reckons with: rates that a grid grows by; rates tried besides the frozen one in a cell; leaders of a
cell that were not frozen."""


def cells_of(steps: int | None = None) -> tuple[list[Cell], list[Cell]]:
    """Of the tuning (without a subject yet) and of the test; with ``steps``, two small ones."""
    tuning, tested = [Cell("", *one) for one in TUNING], [Cell(*one) for one in CELLS]
    return (tuning, tested) if steps is None else ([replace(tuning[2], steps=steps)], [replace(tested[0], steps=steps)])


def bench_of(options: argparse.Namespace) -> Bench:
    """For a model, with its subjects."""
    training = f"--pretrained_model_name_or_path {options.model} --train_batch_size {BATCH}".split()
    subjects = {subject: ("--subject", subject) for subject in (options.tuning_subject, *HELD_OUT)}
    trial = options.plan or options.quick  # whose few steps belong to no result
    folder = Path("outputs") / "robustness" if trial else options.results / RUNS
    file = options.runs or folder / f"{options.model}.jsonl"
    return Bench(training, subjects, file, options.workers)


def plan(
    bench: Bench, methods: Sequence[Method], tuning: Sequence[Cell], tested: Sequence[Cell], effort: Effort
) -> str:
    """How many trainings and hours of one core, by stage, from the time that a few steps of each method take here."""
    tasks = {}
    for method, cell in itertools.product(methods, (*tuning, *tested)):
        short = replace(tuning[0], rank=cell.rank, layers=cell.layers, steps=TIMED_STEPS)
        rate = method.middle and min(method.middle, 1e-3)
        tasks[method, cell] = bench.task(short, Config(method, method.settings[0], rate), effort.tuning_seed)
    rows = bench.run(tasks.values(), "timing")

    def times(method: Method, cell: Cell) -> tuple[float, float]:
        row = rows[tasks[method, cell]]
        return row["step_s"], row["other_s"] + cell.steps * row["step_s"]

    stages: dict[str, list[tuple[float, float]]] = {}  # trainings and the seconds of each
    for method in methods:
        grown, searched = (GROWTH["grown"], GROWTH["searched"]) if method.middle else (0.0, 0.0)
        tuned = len(method.settings) * (len(method.first_rates(effort.points, effort.factor)) + grown)
        stages.setdefault("tuning", []).extend((tuned + (2 if grown else 0), times(method, cell)[1]) for cell in tuning)
        for cell in tested:
            step, whole = times(method, cell)
            usual = times(methods[0], cell)[0]
            led = GROWTH["leaders"] * (len(effort.seeds) - 1) / len(methods)
            of_cell = {"test": float(len(effort.seeds)), "in every cell": searched, "the best": led}
            for stage, count in of_cell.items():
                stages.setdefault(stage, []).append((count, whole))
            if abs(step / usual - 1) > SAME_SPEED:
                stages.setdefault("in the same time", []).append((1.0, whole + (usual - step) * cell.steps))
    told = [(stage, sum(n for n, _ in each), sum(n * s for n, s in each) / 3600) for stage, each in stages.items()]
    told.append(("all", sum(count for _, count, _ in told), sum(hours for *_, hours in told)))
    lines = [f"{stage:17s} {count:6.0f} trainings {hours:7.2f} hours of one core" for stage, count, hours in told]
    return "\n".join([f"{len(methods)} methods, {len(tested)} cells, {len(effort.seeds)} seeds", *lines])


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, make the trainings, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tiny.MODELS, default="tiny")
    parser.add_argument("--methods", nargs="+", metavar="LABEL", help="only these, by label; adamw is always there")
    parser.add_argument("--tuning_subject", default="checkerling")
    parser.add_argument(
        "--seeds", type=int, default=len(FULL.seeds), help="of the test; more cost their own runs alone"
    )
    parser.add_argument("--workers", type=int, default=_machine.usable_cores(), help="processes of one thread")
    parser.add_argument("--runs", type=Path, help=f"finished trainings; default: {RUNS}/<model>.jsonl in --results")
    parser.add_argument("--results", type=Path, default=_machine.RESULTS, help=f"folder of {RESULT}.json and {RUNS}")
    parser.add_argument("--plan", action="store_true", help="time a few steps and say what all of it would take")
    parser.add_argument("--quick", action="store_true", help="two methods, two cells, a few steps: does it run?")
    options = parser.parse_args(argv)
    if options.tuning_subject in HELD_OUT:
        parser.error(f"--tuning_subject must be none of those that are held out: {', '.join(HELD_OUT)}")
    for name in ("workers", "seeds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1 (got {getattr(options, name)})")
    wanted = METHODS if not options.quick else [one for one in METHODS if one.label in QUICK_METHODS]
    if options.methods:
        unknown = set(options.methods) - {method.label for method in METHODS}
        if unknown:
            parser.error(f"--methods {' '.join(sorted(unknown))}: there are {' '.join(m.label for m in METHODS)}")
        wanted = [method for method in METHODS if method is METHODS[0] or method.label in options.methods]
    bench = bench_of(options)
    methods = bench.usable(wanted)
    effort = QUICK if options.quick else replace(FULL, seeds=tuple(range(1, options.seeds + 1)))
    tuning, tested = cells_of(4 if options.quick else None)
    tuning = [replace(cell, subject=options.tuning_subject) for cell in tuning]
    if options.plan:
        print(plan(bench, methods, tuning, tested, effort))
        return
    chosen = tune(bench, methods, tuning, effort)
    for method, choice in chosen.items():
        print(f"{method.label}: {choice.config.setting}, learning rate {choice.config.rate}")
    found = {
        "command": _machine.command("robustness.py"),
        "settings": {"tuning_subject": options.tuning_subject, "seeds": effort.seeds, "batch": BATCH, "layers": LAYERS},
        "left_out": [method.label for method in wanted if method not in methods],
        **result(chosen, test(bench, chosen, tested, effort)),
        "trainings": len(bench.asked),
        "machine": _machine.describe(1),
    }
    file = options.results / f"{RESULT}.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    print(table(found))
    print(f"wrote {_machine.write(RESULT, {**before, options.model: found}, options.results)}")


if __name__ == "__main__":
    _cli.start(main)
