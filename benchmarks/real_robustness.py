"""Claims about robust learning rates, tested on a real model in about one GPU hour. They stand below, made beforehand.

    python benchmarks/real_robustness.py --subjects dog/ cat/ mug/ \
        --prompts "a photo of sks dog" "a photo of sks cat" "a photo of sks mug"
    python benchmarks/real_robustness.py --model tiny

trains LoRAs on the attention layers: --steps steps, batches of --batch, bf16. (SDXL takes four hours: --model
stabilityai/stable-diffusion-xl-base-1.0 --resolution 1024.) Each subject is a folder of at least 8 images of one thing;
4 are held out and measured on (64 frozen items of image, time and noise). The embedded models take their built-in
subjects instead, with fewer and smaller steps; what that says about claims is about them.

1. Tuning, on the first subject, one seed: every method with three rates a factor of sqrt(10) apart in three cells. A
   method's one rate is the one with the best worst cell, in units of the gain that AdamW's best rate has there.
2. Test, on the other two subjects, another seed: every method with its one rate in the three cells of each.

The score of a cell is (L_base - L) / (L_base - L_best), L_best the lowest loss of any method there. A claim says that
one method's worst cell is above another's. It *holds* if the difference is above two standard errors, against each that
it names. Else it *does not hold* if the difference to one of them is below 0.02 by two standard errors, and is *not
decided* if not even that can be said. The standard error is over the images: they are drawn anew, and all is computed
from them, L_best and which cell is the worst too. One seed is one measurement: what other seeds would change is not in
it.

Finished trainings are kept in --runs: the same command goes on.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import _cli
import _machine
import numpy as np
from _robustness import PROGRAM, Bench, Cell, Method, Row
from _robustness_protocol import Choice, Effort, run_frozen, tune

from dreamlora import figures, tiny
from dreamlora.compare.numbers import EDGE_TEXT, number
from dreamlora.compare.schema import Number
from dreamlora.config import PROGRAMS
from dreamlora.errors import UserError

START = "+lora_units=start"


@dataclass(frozen=True)
class Claim:
    """Said before anything was measured.

    Attributes:
        method: whose worst cell is the better one, by label.
        than: than that of each of these.
    """

    text: str
    method: str
    than: tuple[str, ...]


CLAIMS = (
    Claim("Riemannian preconditioning makes one rate do", "scaled_adamw", ("adamw", f"adamw{START}")),
    Claim("units of the start make one rate do", f"adamw{START}", ("adamw",)),
    Claim("LoRA-Muon needs its rate tuned less than AdamW in any units", "lora_muon", ("adamw", f"adamw{START}")),
)
METHODS = {
    "adamw": (2e-4, 4e-3),
    f"adamw{START}": (4e-4, 1.6e-2),
    "scaled_adamw": (3e-4, 8e-3),
    "lora_muon": (1e-2, 0.18),
}
"""The middle of their grids, on a real model and on the embedded ones. The baseline first."""
SETTINGS = {"lora_muon": "momentum=0.7"}
OWN_SETTING = "betas=0.9,0.999"

CELLS = ((4, None, "kaiming"), (64, None, "kaiming"), (64, 1, "gaussian"))
"""Rank, alpha (None: the rank) and start."""
EFFORT = Effort(points=3, grows=False, seeds=(1,), factor=math.sqrt(10))
QUICK = replace(EFFORT, points=1)
STANDARD_ERRORS = 2.0
MATTERS = 0.02
"""A smaller difference of scores is none."""
DRAWS = 2000
HELD_OUT, FEWEST_IMAGES = 4, 8
EMBEDDED_SUBJECTS = ("checkerling", "bannerfish", "twinhouse")


def worst_scores(rows: Mapping[tuple[Method, Cell], Row], drawn: Mapping[str, np.ndarray]) -> dict[Method, np.ndarray]:
    """``[draws]`` by method: the worst cell of the frozen rate; minus infinity if a training broke off.

    Args:
        rows: of the test.
        drawn: ``[draws, images]`` numbers of images, by subject.
    """
    losses = {key: _drawn(row, drawn[key[1].subject]) for key, row in rows.items()}
    scores: dict[Method, list[np.ndarray]] = {}
    for cell in dict.fromkeys(cell for _, cell in rows):
        of_cell = {method: values for (method, at), values in losses.items() if at == cell}
        best = np.min([final for _, final in of_cell.values()], axis=0)
        base, _ = min(of_cell.values(), key=lambda losses: losses[1][0])  # of one that did not break off
        for method, (_, final) in of_cell.items():
            scores.setdefault(method, []).append((base - final) / (base - best))
    return {method: np.min(each, axis=0) for method, each in scores.items()}


def _drawn(row: Row, drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``[draws]``: loss of the base model and at the end."""
    if row["final"] is None:
        return np.full(len(drawn), row["base"]), np.full(len(drawn), math.inf)
    base, final = np.array(row["images"]).T[:, drawn].mean(axis=2)
    return base, final


def judge(rows: Mapping[tuple[Method, Cell], Row], at_edge: Sequence[str]) -> dict[str, Any]:
    """Worst cells by method, and the word about every claim, qualified where a rate is one of ``at_edge``."""
    images = {cell.subject: len(row["images"]) for (_, cell), row in rows.items() if row["images"]}
    rng = np.random.default_rng(0)
    as_they_are = worst_scores(rows, {subject: np.arange(n)[None] for subject, n in images.items()})
    drawn = worst_scores(rows, {subject: rng.integers(n, size=(DRAWS, n)) for subject, n in images.items()})
    point = {method.label: float(value[0]) for method, value in as_they_are.items()}
    again = {method.label: value for method, value in drawn.items()}
    return {
        "images": images,
        "worst": {label: _number(score) for label, score in point.items()},
        "claims": [_judged(claim, point, again, at_edge) for claim in CLAIMS],
    }


def _judged(
    claim: Claim, point: Mapping[str, float], drawn: Mapping[str, np.ndarray], at_edge: Sequence[str]
) -> dict[str, Any]:
    known = [other for other in claim.than if {claim.method, other} <= point.keys()]
    rows = []
    for other in known:
        with np.errstate(invalid="ignore"):  # trainings that broke off
            se = float(np.std(drawn[claim.method] - drawn[other], ddof=1))
            difference = point[claim.method] - point[other]
        rows.append({"than": other, "difference": difference, "se": 0.0 if math.isnan(se) else se})
    words = [decided(row["difference"], row["se"]) for row in rows]
    word = "not decided" if len(known) < len(claim.than) else _of_all(words)
    told = [{**row, "difference": _number(row["difference"]), "se": _number(row["se"])} for row in rows]
    there = [label for label in (claim.method, *known) if label in at_edge]
    verdict = f"{word} ({EDGE_TEXT}: {', '.join(there)})" if there else word
    return {"claim": claim.text, "method": claim.method, "against": told, "verdict": verdict}


def decided(difference: float, se: float) -> str:
    """About one difference of worst cells; both broke off: NaN."""
    if difference > STANDARD_ERRORS * se:
        return "holds"
    return "does not hold" if difference + STANDARD_ERRORS * se < MATTERS or math.isnan(difference) else "not decided"


def _of_all(words: Sequence[str]) -> str:
    return "does not hold" if "does not hold" in words else "not decided" if "not decided" in words else "holds"


def _number(value: float) -> Number:
    return number(float(f"{value:.4g}"))


def edges(chosen: Mapping[Method, Choice]) -> list[str]:
    """Methods whose one rate is the lowest or highest that was tried: a better one may lie beyond."""
    found = []
    for method, choice in chosen.items():
        rates = sorted(config.rate for config in choice.tried if config.rate is not None)
        if len(rates) > 1 and choice.config.rate in (rates[0], rates[-1]):
            found.append(method.label)
    return found


def table(found: Mapping[str, Any]) -> str:
    """A result as a Markdown table."""
    rows = [
        "| Claim | Worst cell | Against | Difference ± 2 standard errors | Verdict |",
        "| --- | --- | --- | --- | --- |",
    ]
    for claim in found["claims"]:
        for against in claim["against"]:
            worst = figures.score(figures.value_of(found["worst"][claim["method"]]) or 0.0)
            error = 2 * (figures.value_of(against["se"]) or 0.0)
            difference = figures.value_of(against["difference"])
            told = figures.NONE if difference is None else f"{figures.score(difference)} ± {figures.score(error)}"
            rows.append(f"| {claim['claim']} | {worst} | `{against['than']}` | {told} | {claim['verdict']} |")
    return "\n".join(rows) + "\n"


def cells(subject: str, steps: int) -> list[Cell]:
    """Of a subject."""
    return [Cell(subject, rank, alpha, start, "attention", steps, None) for rank, alpha, start in CELLS]


def methods(embedded: bool) -> list[Method]:
    """All that the claims are about."""
    return [Method(entry, (SETTINGS.get(entry, OWN_SETTING),), middles[embedded]) for entry, middles in METHODS.items()]


def bench_of(options: argparse.Namespace) -> Bench:
    """For a model, with its subjects."""
    training = f"--pretrained_model_name_or_path {options.model} --train_batch_size {options.batch}".split()
    if options.model in tiny.MODELS:
        subjects = {subject: ("--subject", subject) for subject in EMBEDDED_SUBJECTS}
    else:
        training += f"--mixed_precision bf16 --resolution {options.resolution} --holdout {HELD_OUT}".split()
        subjects = {
            folder.name: ("--instance_data_dir", str(folder), "--instance_prompt", prompt)
            for folder, prompt in zip(options.subjects, options.prompts, strict=True)
        }
    name = re.sub(r"\W+", "-", options.model.rstrip("/").rpartition("/")[2])
    file = options.runs or Path("outputs") / "real_robustness" / f"{name}.jsonl"
    return Bench(training, subjects, file)


def check_images(bench: Bench, folders: Sequence[Path]) -> None:
    """Enough of them, before the first hour.

    Raises:
        UserError: a folder has too few.
    """
    from dreamlora.cli.parse import parse_run
    from dreamlora.data.dataset import list_images

    for folder in folders:
        words = [*bench.training, "--instance_data_dir", str(folder), "--instance_prompt", "a photo"]
        count = len(list_images(parse_run(words, PROGRAMS[PROGRAM])[0].data).records)
        if count < FEWEST_IMAGES:
            raise UserError(
                f"--subjects {folder}: {count} images; give at least {FEWEST_IMAGES}, {HELD_OUT} are held out"
            )


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5", help="or tiny, tiny-flow")
    parser.add_argument("--subjects", nargs=3, type=Path, help="three folders of images; the first is tuned on")
    parser.add_argument("--prompts", nargs=3, help="the instance prompt of each")
    parser.add_argument("--resolution", type=int, default=512)
    parser.add_argument("--steps", type=int, help="default: 400; 100 on the embedded models")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--runs", type=Path, help="finished trainings; default: outputs/real_robustness/<model>.jsonl")
    parser.add_argument("--results", type=Path, default=_machine.RESULTS, help="folder of real_robustness_<model>.json")
    parser.add_argument("--quick", action="store_true", help="one rate for each method: does it run?")
    options = parser.parse_args(argv)
    embedded = options.model in tiny.MODELS
    if not embedded and not (options.subjects and options.prompts):
        parser.error("give three --subjects and their --prompts, or --model tiny")
    if embedded and (options.subjects or options.prompts):
        parser.error(f"--model {options.model} takes its built-in subjects: leave --subjects and --prompts out")
    if not embedded and len({folder.name for folder in options.subjects}) < 3:
        parser.error("--subjects: three folders of different names")
    options.steps = options.steps or (100 if embedded else 400)
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags, make the trainings, print and write."""
    options = parsed(argv)
    bench = bench_of(options)
    if options.subjects:
        check_images(bench, options.subjects)
    effort = QUICK if options.quick else EFFORT
    subjects = [folder.name for folder in options.subjects] if options.subjects else list(EMBEDDED_SUBJECTS)
    usable = bench.usable(methods(options.model in tiny.MODELS))
    chosen = tune(bench, usable, cells(subjects[0], options.steps), effort)
    tested = [cell for subject in subjects[1:] for cell in cells(subject, options.steps)]
    rows = run_frozen(bench, {method: choice.config for method, choice in chosen.items()}, tested, effort)
    at_edge = edges(chosen)
    found = {
        "command": _machine.command("real_robustness.py"),
        "model": Path(options.model).name,
        "settings": {"steps": options.steps, "batch": options.batch, "rates": effort.points},
        "learning_rates": {method.label: choice.config.rate for method, choice in chosen.items()},
        **judge({key: each[0] for key, each in rows.items()}, at_edge),
        "machine": _machine.describe(1),
    }
    print(table(found))
    print(f"wrote {_machine.write(_machine.file_name('real_robustness', found['model']), found, options.results)}")


if __name__ == "__main__":
    _cli.start(main)
