"""The tables of a comparison; the HTML and the Markdown report share them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dreamlora.compare.verdict import rate_text
from dreamlora.escapes import inner_link
from dreamlora.figures import NONE, amount, interval, loss, percent, rate, size_in_percent, spread, value_of
from dreamlora.metric_names import short
from dreamlora.report.comparison import ComparisonFile, verdict
from dreamlora.report.words import duration

JsonObject = dict[str, Any]


@dataclass(frozen=True)
class TableCell:
    """A cell.

    Attributes:
        text: as it is read.
        key: what the column is sorted by; None goes last.
        tone: "good", "bad" or "".
        notes: cautions that belong to this number.
        method: number of the method whose name this is, or None.
        link: relative to the page.
    """

    text: str
    key: float | str | None = None
    tone: str = ""
    notes: tuple[str, ...] = ()
    method: int | None = None
    link: str | None = None


@dataclass(frozen=True)
class Head:
    """A column's heading; numbers stand on the right."""

    text: str
    numeric: bool = True


@dataclass(frozen=True)
class Table:
    """Rows under headings; the first entry of a row names it."""

    name: str
    caption: str
    heads: tuple[Head, ...]
    rows: tuple[tuple[TableCell, ...], ...]


def results(comparison: ComparisonFile) -> Table:
    """What came out: loss and verdict of every method at its own best learning rate."""
    heads = [Head("method", False), Head("verdict", False), Head(f"loss against {comparison.baseline} [95\u00a0%]")]
    heads += [
        Head("± images"),
        Head("seeds won"),
        Head("final loss [min, max]"),
        Head("against base model"),
        Head("learning rate"),
    ]
    return Table(
        "results",
        "Every method at its own best learning rate, or at those that its runs found. A negative percentage is a lower "
        "loss, which is better. The interval is over the seeds; a run that diverged or failed has an infinite loss. "
        "“± images” is the standard error that the choice of the images adds.",
        tuple(heads),
        tuple(_result(comparison, method) for method in comparison.methods),
    )


def _result(comparison: ComparisonFile, method: JsonObject) -> tuple[TableCell, ...]:
    delta, finding = method["delta"], verdict(method)
    edge = (f"at the {'lower' if method['at_grid_edge'] == 'low' else 'upper'} edge of the grid",)
    suggested = ", ".join(map(rate, method.get("suggested_lrs") or []))
    tried = (f"try {suggested}",) if suggested else ()
    return (
        _name(comparison, method),
        TableCell(finding.word, finding.word, {"good": "good", "bad": "bad"}.get(finding.tone, ""), finding.cautions),
        TableCell(interval(delta["pct"]), _key(delta["pct"]["mean"]), notes=_of_ended(delta))
        if delta
        else TableCell(NONE),
        TableCell(NONE) if delta is None else _entry(delta["images_se_pct"], size_in_percent),
        _wins(delta),
        TableCell(spread(method["final"]), _key(method["final"]["median"]), notes=_of_seeds(method)),
        _entry(method["vs_base_pct"], percent),
        TableCell(rate_text(method), _rate_key(method), notes=(*edge, *tried) if method["at_grid_edge"] else ()),
    )


def _rate_key(method: JsonObject) -> float | None:
    found = method.get("found_lrs")
    return statistics.median(found) if found else _key(method["best_lr"])


def _wins(delta: JsonObject | None) -> TableCell:
    if delta is None or not delta["pct"]["n"]:
        return TableCell(NONE)
    return TableCell(f"{delta['wins']} of {delta['pct']['n']}", delta["wins"])


def _of_ended(delta: JsonObject) -> tuple[str, ...]:
    """The difference without the seeds in which one of the two has no loss, if there are such."""
    both, seeds = delta["ended"]["n"], delta["pct"]["n"]
    return (f"{interval(delta['ended'])} in the {both} of {seeds} seeds that both ended",) if 0 < both < seeds else ()


def _of_seeds(method: JsonObject) -> tuple[str, ...]:
    seeds, diverged = len(method["headline_seeds"]), method["headline_diverged"]
    return (f"{diverged} of {seeds} seeds diverged or failed",) if diverged else ()


def speed(comparison: ComparisonFile) -> Table:
    """How fast each method is, in steps and in seconds."""
    target = loss(comparison["target"])
    heads = [Head("method", False), Head("steps to target [min, max]"), Head("reached"), Head("speed-up in steps")]
    heads += [Head("seconds to target"), Head("speed-up in seconds"), Head("seconds per step"), Head("memory")]
    heads += [Head("log AUC")]
    return Table(
        "speed",
        f"Target: a loss of {target}, 1 % above the median of {comparison.baseline}’s best. "
        "Speed-up: its median over this method’s; above 1 is faster. Log AUC: mean of ln(loss / base loss); lower is "
        "earlier and deeper.",
        tuple(heads),
        tuple(_speed(comparison, method) for method in comparison.methods),
    )


def _speed(comparison: ComparisonFile, method: JsonObject) -> tuple[TableCell, ...]:
    steps, seconds = method["steps_to_target"], method["seconds_to_target"]
    memory = value_of(method["peak_memory_gib"]["median"])
    return (
        _name(comparison, method),
        TableCell(spread(steps["spread"], amount), _key(steps["spread"]["median"])),
        TableCell(f"{steps['reached']} of {steps['spread']['n']}", steps["reached"]),
        _entry(steps["speedup"], _times),
        TableCell(spread(seconds["spread"], amount), _key(seconds["spread"]["median"])),
        _entry(seconds["speedup"], _times),
        TableCell(spread(method["seconds_per_step"], amount), _key(method["seconds_per_step"]["median"])),
        TableCell(NONE if memory is None else f"{memory:.3g}\u202fGiB", memory),
        TableCell(spread(method["log_auc"], _log_auc), _key(method["log_auc"]["median"])),
    )


def basins(comparison: ComparisonFile) -> Table | None:
    """How wide the range of good learning rates is, in decades, by tolerance; None if all runs found their rates."""
    methods = [method for method in comparison.methods if method["lr_basin"]]
    tolerances = sorted({basin["tolerance"] for method in methods for basin in method["lr_basin"]})
    heads = [Head("method", False), *(Head(f"within {100 * tolerance:g} %") for tolerance in tolerances)]
    rows = []
    for method in methods:
        by_tolerance = {basin["tolerance"]: basin for basin in method["lr_basin"]}
        rows.append((_name(comparison, method), *(_basin(by_tolerance.get(tolerance)) for tolerance in tolerances)))
    caption = (
        "Decades of learning rates whose median loss lies within so much of the best of all methods; ≥ where the "
        "range goes on beyond the rates that were tried."
    )
    return Table("basins", caption, tuple(heads), tuple(rows)) if rows else None


def _basin(basin: JsonObject | None) -> TableCell:
    decades = value_of(basin["decades"]) if basin else None
    if not basin or decades is None or value_of(basin["low"]) is None:
        return TableCell("none", 0.0 if basin else None)
    censored = basin["censored_low"] or basin["censored_high"]
    ends = f"{rate(basin['low'])} … {rate(basin['high'])}"
    return TableCell(f"{'≥ ' if censored else ''}{decades:.2f} ({ends})", decades)


def rates(comparison: ComparisonFile) -> Table | None:
    """Every learning rate that was tried; None if all runs found theirs."""
    same = {(row["method"], row["lr"]): row for row in comparison["same_lr"] or []}
    heads = [Head("method", False), Head("learning rate"), Head("final loss [min, max]"), Head("diverged or failed")]
    heads += [Head(f"against {comparison.baseline} at this rate"), Head("‖ΔW‖"), Head("update RMS")]
    rows = [
        _rate(comparison, method, point, same.get((method["label"], point["lr"])))
        for method in comparison.methods
        for point in method["rates"]
    ]
    caption = (
        "Tuning runs. The same rate means another step length to another optimizer, so the differences at one rate "
        "are no verdict: ‖ΔW‖, the norm of all that was learned, and the root mean square of an update tell why."
    )
    return Table("rates", caption, tuple(heads), tuple(rows)) if rows else None


def _rate(
    comparison: ComparisonFile, method: JsonObject, point: JsonObject, same: JsonObject | None
) -> tuple[TableCell, ...]:
    notes: tuple[str, ...] = ("best",) if point["lr"] == method["best_lr"] else ()
    notes += ("added",) if point["added"] else ()
    diverged = point["n_diverged"]
    compared = TableCell(interval(same["pct"]), _key(same["pct"]["mean"])) if same else TableCell(NONE)
    return (
        _name(comparison, method),
        TableCell(rate(point["lr"]), point["lr"], notes=notes),
        TableCell(spread(point["final"]), _key(point["final"]["median"])),
        TableCell(f"{diverged} of {point['n_runs']}", diverged, "bad" if diverged else ""),
        compared,
        TableCell(spread(point["dw_norm"], amount), _key(point["dw_norm"]["median"])),
        TableCell(spread(point["update_rms"], amount), _key(point["update_rms"]["median"])),
    )


def octiles(comparison: ComparisonFile) -> Table | None:
    """The difference by noise level; None if it was not computed."""
    others = [method for method in comparison.methods if method["octiles"]]
    numbers = sorted({octile["octile"] for method in others for octile in method["octiles"]})
    if not numbers:
        return None
    rows = []
    for method in others:
        by_octile = {octile["octile"]: octile["pct"] for octile in method["octiles"]}
        cells = [
            TableCell(interval(by_octile[n]), _key(by_octile[n]["mean"])) if n in by_octile else TableCell(NONE)
            for n in numbers
        ]
        rows.append((_name(comparison, method), *cells))
    caption = f"Loss against {comparison.baseline} by eighths of the timesteps: 1 is the least noisy, 8 the noisiest."
    return Table("octiles", caption, (Head("method", False), *(Head(str(n + 1)) for n in numbers)), tuple(rows))


def images(comparison: ComparisonFile) -> Table | None:
    """The image metrics; None if none were computed."""
    columns: dict[tuple[str, str], JsonObject] = {}
    for method in comparison.methods:
        for metric in method["images"]:
            columns.setdefault((metric["name"], metric["at"]), metric)
    if not columns:
        return None
    rows = []
    for method in comparison.methods:
        mine = {(metric["name"], metric["at"]): metric["value"] for metric in method["images"]}
        cells = [
            TableCell(interval(mine[key], amount), _key(mine[key]["mean"]))
            if key in mine
            else TableCell("not computed")
            for key in columns
        ]
        rows.append((_name(comparison, method), *cells))
    heads = [Head(f"{short(name)}, {'last' if at == 'final' else 'best'} step") for name, at in columns]
    caption = f"Image metrics over the seeds [95\u00a0%]{_seen_by(columns)} They describe; the verdict is by the loss."
    return Table("images", caption, (Head("method", False), *heads), tuple(rows))


def _seen_by(columns: Mapping[tuple[str, str], JsonObject]) -> str:
    """Which encoder saw how many images, metric by metric where they differ."""
    names: dict[tuple[str, int | None], list[str]] = {}
    for (name, _), metric in columns.items():
        encoder = metric["encoder_id"] or "an encoder that was not logged"
        names.setdefault((encoder, metric["images"]), []).append(short(name))
    seen = [
        (" and ".join(dict.fromkeys(those)), f"by {encoder}" + (f", {count} images" if count else ""))
        for (encoder, count), those in names.items()
    ]
    return f", {seen[0][1]}." if len(seen) == 1 else ": " + "; ".join(f"{those} {by}" for those, by in seen) + "."


def runs(comparison: ComparisonFile) -> Table:
    """Every run."""
    heads = [Head("method", False), Head("learning rate"), Head("seed"), Head("part", False), Head("state", False)]
    heads += [Head("final loss"), Head("best loss"), Head("best step"), Head("steps to target"), Head("time")]
    heads += [Head("folder", False)]
    rows = tuple(_run(comparison, run) for run in comparison.runs)
    return Table("runs", f"{len(rows)} runs.", tuple(heads), rows)


def _run(comparison: ComparisonFile, run: JsonObject) -> tuple[TableCell, ...]:
    bad = run["status"] in ("diverged", "failed")
    seconds = value_of(run["seconds"][-1]) if run["seconds"] else None
    number = comparison.labels.index(run["method"]) if run["method"] in comparison.labels else None
    message = (run["message"],) if run["message"] else ()
    best_step = run["best_step"]
    return (
        TableCell(run["method"], run["method"], method=number),
        _entry(run["lr"], rate),
        TableCell(str(run["seed"]), run["seed"]),
        TableCell(run["role"], run["role"]),
        TableCell(run["status"], run["status"], "bad" if bad else "", message),
        _entry(run["final"], loss),
        _entry(run["best"], loss),
        TableCell(NONE if best_step is None else str(best_step), best_step),
        _entry(run["steps_to_target"], amount),
        TableCell(NONE if seconds is None else duration(seconds), seconds),
        TableCell(run["id"], run["id"], link=inner_link(run["report"])),
    )


def _name(comparison: ComparisonFile, method: JsonObject) -> TableCell:
    label = method["label"]
    return TableCell(label, label, method=comparison.labels.index(label))


def _entry(value: Any, write: Callable[[Any], str]) -> TableCell:
    return TableCell(write(value), _key(value))


def _key(entry: Any) -> float | None:
    """For sorting; infinity becomes a number that the page's script can read."""
    value = value_of(entry)
    if value is None or math.isfinite(value):
        return value
    return math.copysign(1e308, value)


def _log_auc(entry: Any) -> str:
    value = value_of(entry)
    return "∞" if value is not None and math.isinf(value) else amount(value)


def _times(entry: Any) -> str:
    value = value_of(entry)
    return NONE if value is None or math.isinf(value) else f"{value:.2f}\u202f×"


def all_of(comparison: ComparisonFile) -> dict[str, Table]:
    """The tables by name, without those that would be empty."""
    makers: Sequence[Callable[[ComparisonFile], Table | None]] = (results, speed, basins, rates, octiles, images, runs)
    return {table.name: _without_gaps(table) for make in makers if (table := make(comparison)) is not None}


def _without_gaps(table: Table) -> Table:
    """Without columns that hold nothing, such as the memory of runs on CPUs."""
    kept = [n for n in range(len(table.heads)) if n == 0 or any(row[n].text != NONE for row in table.rows)]
    rows = tuple(tuple(row[n] for n in kept) for row in table.rows)
    return Table(table.name, table.caption, tuple(table.heads[n] for n in kept), rows)
