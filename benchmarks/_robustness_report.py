"""What a test of robustness says: numbers for the result file, and tables of it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from _robustness import Cell, Method, Row, loss
from _robustness_protocol import Choice, Test, luck, step_ratio
from _robustness_scores import (
    against,
    point_scores,
    vertex,
    worst_difference,
    worst_interval,
    worst_word,
)

from dreamlora import figures
from dreamlora.compare.numbers import number
from dreamlora.compare.schema import Number
from dreamlora.compare.stats import TInterval

AIM = {"worst": 0.95, "low": 0.9}
"""Of the worst cell and of the lower end of its interval."""
LEVELS: dict[str, tuple[Any, Any]] = {"rank": (4, 64), "layers": ("attention", "all")}
"""Whose best rates are divided by each other; the interval is two standard errors over the cells."""


def result(chosen: Mapping[Method, Choice], test: Test) -> dict[str, Any]:
    """Everything about every method, by its label; the baseline is the first."""
    methods = {method.label: _about(method, choice, test) for method, choice in chosen.items()}
    reached = [label for label, of in methods.items() if _reaches_aim(of)]
    return {"baseline": next(iter(methods)), "aim": AIM, "aim_reached_by": reached, "methods": methods}


def _about(method: Method, choice: Choice, test: Test) -> dict[str, Any]:
    tested, baseline = test.tested, next(iter(test.tested.frozen))
    scores, others = point_scores(tested, method), point_scores(tested, method, others_only=True)
    tuned = {cell: _tuned(method, cell, score, test) for cell, score in scores.items()}
    timed = {cell: scores[cell] - _in_score(method, cell, test) for cell in scores}
    ratios = [step_ratio(test.frozen, method, baseline, cell) for cell in scores]
    compared, difference = against(tested, method, baseline), worst_difference(tested, method, baseline)
    return {
        "setting": choice.config.setting,
        "learning_rate": choice.config.rate,
        "tried": [
            {"setting": config.setting, "learning_rate": config.rate, "merit": _three(merit)}
            for config, merit in choice.tried.items()
        ],
        "worst": _spread(scores, worst_interval(tested, method)),
        "worst_of_others": _spread(others, worst_interval(tested, method, others_only=True)),
        "median": _three(statistics.median(scores.values())),
        "cells": {str(cell): _three(score) for cell, score in scores.items()},
        "tuned": {"worst": _three(min(tuned.values())), "median": _three(statistics.median(tuned.values()))},
        "worst_beside": {"lower": _worst_beside(method, -1, test), "higher": _worst_beside(method, 1, test)},
        "same_seconds": {"worst": _three(min(timed.values())), "median": _three(statistics.median(timed.values()))},
        "step_ratio": _three(statistics.geometric_mean(ratios)) if all(ratios) else None,
        "best_rates": _best_rates(method, test),
        "loss_against_baseline": {"pct": _interval(compared.pct), "verdict": compared.word, "cells": compared.cells},
        "worst_against_baseline": {"difference": _interval(difference), "verdict": worst_word(difference)},
    }


def _tuned(method: Method, cell: Cell, score: float, test: Test) -> float:
    """The score with the rate that is best in this very cell, by one seed."""
    frozen = test.tested.frozen[method].rate
    others = (row for rate, row in test.searched[method, cell].items() if rate != frozen)
    return max([score, *(_by_one_seed(row, cell, test) for row in others)])


def _worst_beside(method: Method, by: int, test: Test) -> Number:
    """With the next lower or higher rate; None if a cell was not trained with it."""
    scores = [_beside(method, cell, by, test) for cell in test.tested.losses]
    known = [score for score in scores if score is not None]
    return _three(min(known)) if len(known) == len(scores) else None


def _beside(method: Method, cell: Cell, by: int, test: Test) -> float | None:
    """The score with the next lower or higher rate of the cell's grid, by one seed; None if there is none."""
    rows = {rate: row for rate, row in test.searched[method, cell].items() if rate is not None}
    rates = sorted(rows)
    rate = test.tested.frozen[method].rate
    at = rates.index(rate) + by if rate in rows else -1
    return _by_one_seed(rows[rates[at]], cell, test) if 0 <= at < len(rates) else None


def _by_one_seed(row: Row, cell: Cell, test: Test) -> float:
    """The score of a training with the first seed, whose luck is taken off."""
    return (test.tested.base[cell] - loss(row) + luck(test.frozen, cell)) / _scale(cell, test)


def _in_score(method: Method, cell: Cell, test: Test) -> float:
    """By how much the score is lower after the seconds of the baseline."""
    return test.shorter.get((method, cell), 0.0) / _scale(cell, test)


def _scale(cell: Cell, test: Test) -> float:
    losses = test.tested.losses[cell].values()
    return test.tested.base[cell] - min(statistics.fmean(values) for values in losses)


def _best_rates(method: Method, test: Test) -> dict[str, Any] | None:
    """Geometric means of the best rates, between those tried, over the cells of a rank and of a choice of layers; and
    the ratio of two."""
    best = {}
    for (one, cell), rows in test.searched.items():
        losses = {rate: loss(row) for rate, row in rows.items() if rate is not None}
        if one == method and losses:
            best[cell] = math.log(vertex(losses))
    found = {}
    for name, ends in LEVELS.items():
        by_level: dict[Any, list[float]] = {}
        for cell, rate in best.items():
            by_level.setdefault(getattr(cell, name), []).append(rate)
        if not by_level.keys() >= set(ends):
            return None
        means = {str(level): _three(math.exp(statistics.fmean(each))) for level, each in sorted(by_level.items())}
        found[name] = {"mean": means, "ratio": _ratio(*(by_level[end] for end in ends))}
    return found


def _ratio(some: Sequence[float], others: Sequence[float]) -> dict[str, Number]:
    """Of geometric means, from logarithms."""
    apart = statistics.fmean(some) - statistics.fmean(others)
    enough = min(len(some), len(others)) > 1
    se = math.sqrt(sum(statistics.variance(each) / len(each) for each in (some, others))) if enough else math.nan
    ends = {"mean": apart, "low": apart - 2 * se, "high": apart + 2 * se}
    return {name: _three(math.exp(value)) for name, value in ends.items()}


def _reaches_aim(of: Mapping[str, Any]) -> bool:
    worst, low = (figures.value_of(of["worst"][name]) for name in ("score", "low"))
    return worst is not None and low is not None and worst >= AIM["worst"] and low >= AIM["low"]


def _spread(scores: Mapping[Cell, float], interval: tuple[float, float]) -> dict[str, Any]:
    cell = min(scores, key=lambda cell: scores[cell])
    low, high = map(_three, interval)
    return {"score": _three(scores[cell]), "low": low, "high": high, "cell": str(cell)}


def _interval(of: TInterval) -> dict[str, Any]:
    return {"mean": _three(of.mean), "low": _three(of.low), "high": _three(of.high), "n": of.n}


def _three(value: float) -> Number:
    """As results are written: finite numbers to four digits."""
    return number(float(f"{value:.4g}"))


HEADS = (
    "One rate for all",
    "Setting, rate",
    "Worst cell, 95 %",
    "without its own best",
    "Median",
    "Worst, half and twice the rate",
    "Worst, tuned in every cell",
    "Worst, same seconds",
    "Step",
    "Best rates, rank 4 : 64",
    "attention : all layers",
    "Loss against the baseline",
    "Worst cell against the baseline",
)


def table(found: Mapping[str, Any]) -> str:
    """A result as a Markdown table, the best worst cell first."""
    methods = sorted(found["methods"].items(), key=lambda item: -(figures.value_of(item[1]["worst"]["score"]) or 0.0))
    rows = [HEADS, ("---",) * len(HEADS), *(_cells(label, of, found["baseline"]) for label, of in methods)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _cells(label: str, of: Mapping[str, Any], baseline: str) -> Sequence[str]:
    rate = "finds its own" if of["learning_rate"] is None else figures.rate(of["learning_rate"])
    loss_, worst = of["loss_against_baseline"], of["worst_against_baseline"]
    itself = label == baseline
    return (
        f"`{label}`",
        f"`{of['setting']}`, {rate}",
        f"{_score(of['worst']['score'])} [{_score(of['worst']['low'])}, {_score(of['worst']['high'])}]",
        _score(of["worst_of_others"]["score"]),
        _score(of["median"]),
        " · ".join(map(_score, of["worst_beside"].values())),
        _score(of["tuned"]["worst"]),
        _score(of["same_seconds"]["worst"]),
        figures.NONE if of["step_ratio"] is None else f"{of['step_ratio']:.2f} ×",
        *(
            figures.interval(of["best_rates"][name]["ratio"], _score) if of["best_rates"] else figures.NONE
            for name in LEVELS
        ),
        "baseline" if itself else f"{figures.interval(loss_['pct'])}: {loss_['verdict']}",
        "baseline" if itself else f"{figures.interval(worst['difference'], _score)}: {worst['verdict']}",
    )


def _score(value: Number) -> str:
    score = figures.value_of(value)
    if score is None:
        return figures.NONE
    return f"{score:.2f}".replace("-", figures.MINUS).replace("inf", "∞")
