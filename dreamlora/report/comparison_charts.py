"""The charts of a comparison. Methods differ in colour, marker and line, so that colours alone tell nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dreamlora.figures import value_of
from dreamlora.report.comparison import ComparisonFile
from dreamlora.report.svg import INK, LINE, WIDTH, Chart, by_step, chart, legend, level, lines_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#6c7686", "#3b82f6", "#d9731a", "#2a9d5c", "#c94fb3", "#7c5cd6", "#1b98a8", "#e0453b")
"""By method, the baseline first; each has a contrast of 3 or more on the light and on the dark page."""
_MARKERS = "osD^vPX*"
_LINES: tuple[Any, ...] = ("-", "-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)))
_EQUIVALENT = 1.0
_BASIN = 0.05
_HIGHEST = 1.25
"""Losses above so many times the base model's are left out of the picture, which they would squeeze."""
_FARTHEST = 100.0
"""The same for differences, in percent."""
_LEAST_SPAN = 0.02
_POINTS = 2000
"""Of a curve with its band; what else there is lies between them, and would not be seen."""
_TALL = (WIDTH, 3.0)
_ROW, _GAP = 0.42, 0.05
"""Inches: of an interval with its seeds, below the name of the method; below the last one."""
JsonObject = dict[str, Any]


def colour(number: int) -> str:
    """Of a method, by its place in the comparison."""
    return COLOURS[number % len(COLOURS)]


def all_of(comparison: ComparisonFile) -> dict[str, Chart]:
    """The charts by name, without those that would be empty."""
    makers = (deltas, curves, ends, rates, octiles)
    return {picture.name: picture for make in makers if (picture := make(comparison)) is not None}


def deltas(comparison: ComparisonFile) -> Chart | None:
    """Each method's difference from the baseline with its interval, over seeds that both ended; grey: within 1 %."""
    compared = [
        (number, method)
        for number, method in enumerate(comparison.methods)
        if method["delta"] and value_of(method["delta"]["ended"]["mean"]) is not None
    ]
    if not compared:
        return None

    names = [_with_failures(method) for _, method in compared]
    ends = np.cumsum([_ROW + LINE * len(lines_of(name)) for name in names])
    axis = f"final loss against {comparison.baseline}, % (left is better)"

    def draw(axes: Axes) -> None:
        for name, end, (number, method) in zip(names, ends, compared, strict=True):
            top, middle = end - _ROW, end - 0.6 * _ROW  # of what is drawn below the name
            text = axes.text(0, top, name, transform=axes.get_yaxis_transform(), va="bottom", color=INK)
            text.set_in_layout(False)  # beside a wide one there would be no room for the axes
            axes.fill_betweenx([top, end], -_EQUIVALENT, _EQUIVALENT, color=INK, alpha=0.08, linewidth=0)
            axes.plot([0, 0], [top, end], color=INK, alpha=0.5, linewidth=1)
            _interval(axes, method["delta"]["ended"], (middle, number))
            for pair in method["delta"]["pairs"]:
                if (pct := value_of(pair["pct"])) is not None and np.isfinite(pct):
                    axes.plot([pct], [end - 0.2 * _ROW], marker="|", markersize=6, color=colour(number), alpha=0.7)
        low_end, high_end = axes.get_xlim()
        axes.set_xlim(max(low_end, -_FARTHEST), min(high_end, _FARTHEST))
        axes.set_yticks([])
        axes.set_ylim(ends[-1] + _GAP, 0)
        axes.set_xlabel(axis)

    label = "; ".join(method["delta"]["sentence"] for _, method in compared)
    return chart("delta", label, draw, (WIDTH, ends[-1] + _GAP + 0.5 + LINE * len(lines_of(axis))))


def _with_failures(method: JsonObject) -> str:
    """A method's name, with the seeds that the picture cannot show."""
    both, seeds = method["delta"]["ended"]["n"], method["delta"]["pct"]["n"]
    return method["label"] + (f" (without {seeds - both} of {seeds} seeds that failed)" if both < seeds else "")


def _interval(axes: Axes, pct: JsonObject, place: tuple[float, int]) -> None:
    """A horizontal interval at a height, in a method's colour."""
    height, number = place
    mean, low, high = (value_of(pct[key]) for key in ("mean", "low", "high"))
    if low is not None and high is not None:
        axes.plot([low, high], [height, height], color=colour(number), linewidth=2.5, solid_capstyle="butt")
    if mean is not None:
        axes.plot([mean], [height], marker=_marker(number), markersize=8, color=colour(number))


def curves(comparison: ComparisonFile) -> Chart | None:
    """Loss by step of all methods at their own best learning rates."""
    return _curves(comparison, "curves", 0.0)


def ends(comparison: ComparisonFile) -> Chart | None:
    """The second half of the curves, enlarged."""
    steps = max((method["curve"]["steps"][-1] for method in comparison.methods if method["curve"]["steps"]), default=0)
    return _curves(comparison, "curves_end", steps / 2)


def _curves(comparison: ComparisonFile, name: str, begin: float) -> Chart | None:
    bands = [(number, band) for number, m in enumerate(comparison.methods) if (band := _band(m["curve"], begin))]
    if not bands:
        return None

    def draw(axes: Axes) -> None:
        for number, (steps, middle, low, high) in bands:
            if low:
                axes.fill_between(steps, low, high, color=colour(number), alpha=0.16, linewidth=0)
            axes.plot(steps, middle, label=comparison.labels[number], **_style(number))
        base, target = _height(comparison["base_loss"]), _height(comparison["target"])
        if base is not None and not begin:
            level(axes, base, "base model")
        _crop(axes, base)
        low_end, high_end = axes.get_ylim()
        if target is not None and begin and low_end < target < high_end:
            level(axes, target, "target", "above right")
        if high_end - low_end < _LEAST_SPAN * high_end:  # a difference of nothing is to look like nothing
            middle_of = (low_end + high_end) / 2
            axes.set_ylim(middle_of * (1 - _LEAST_SPAN / 2), middle_of * (1 + _LEAST_SPAN / 2))
        axes.set_ylabel("loss on held-out images" if comparison["held_out"] else "loss on training images")
        by_step(axes)
        legend(axes)

    ended = ", ".join(f"{comparison.labels[number]} {band[1][-1]:.4g}" for number, band in bands)
    return chart(name, f"Loss by step from step {bands[0][1][0][0]}; at the end: {ended}", draw, _TALL)


def _band(curve: JsonObject, begin: float) -> tuple[list[float], list[float], list[float], list[float]] | None:
    """Steps, mean (or median) and interval (or range) from a step on; without an interval if there is one seed."""
    middle, low, high = ("mean", "low", "high")
    if not any(value_of(value) is not None for value in curve[low]):
        middle, low, high = ("median", "min", "max")
    rows = []
    for step, *values in zip(curve["steps"], curve[middle], curve[low], curve[high], strict=True):
        numbers = [value_of(value) for value in values]
        if step >= begin and numbers[0] is not None:
            rows.append((step, numbers[0], *(numbers[0] if value is None else value for value in numbers[1:])))
    if not rows:
        return None
    rows = [*rows[: -1 : 1 + len(rows) // _POINTS], rows[-1]]
    steps, means, lows, highs = (list(column) for column in zip(*rows, strict=True))
    return (steps, means, lows, highs) if lows != highs else (steps, means, [], [])


def rates(comparison: ComparisonFile) -> Chart | None:
    """Final loss by learning rate: the basins."""
    points = [_finite(method) for method in comparison.methods]
    medians = [median for method_points in points for _, median, _, _ in method_points]
    if not medians or len({lr for method_points in points for lr, *_ in method_points}) < 2:
        return None
    best = min(medians)
    base = _height(comparison["base_loss"])

    def draw(axes: Axes) -> None:
        axes.set_xscale("log")
        axes.axhspan(best, best * (1 + _BASIN), color=INK, alpha=0.08, linewidth=0)
        for number, method_points in enumerate(points):
            if not method_points:
                continue
            lrs, middle, low, high = (np.array(column) for column in zip(*method_points, strict=True))
            axes.vlines(lrs, low, high, color=colour(number), alpha=0.5, linewidth=1.5)
            axes.plot(lrs, middle, label=comparison.labels[number], marker=_marker(number), **_style(number))
        if base is not None:
            level(axes, base, "base model", "above left")
        _bests(axes, comparison, points)
        _crop(axes, base)
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom, top + 0.2 * (top - bottom))  # room for the crosses
        _broken(axes, comparison, top)
        axes.set_ylabel("final loss")
        axes.set_xlabel("learning rate (grey: within 5 %; ×: failed or above)")
        legend(axes)

    best_rates = ", ".join(
        f"{method['label']} best at {method['best_lr']:.3g}" for method in comparison.methods if method["best_lr"]
    )
    return chart("rates", f"Final loss by learning rate: {best_rates}", draw, _TALL)


def _finite(method: JsonObject) -> list[tuple[float, float, float, float]]:
    """Learning rate, median, least and greatest final loss, of rates whose median is finite."""
    points = []
    for point in method["rates"]:
        median, low, high = (value_of(point["final"][key]) for key in ("median", "min", "max"))
        if median is not None and low is not None and high is not None and np.isfinite(median):
            points.append((float(point["lr"]), median, low, high if np.isfinite(high) else median))
    return points


def _height(entry: Any) -> float | None:
    """Where a line can be drawn; None for infinity too."""
    value = value_of(entry)
    return value if value is not None and np.isfinite(value) else None


def _crop(axes: Axes, base: float | None) -> None:
    """End the picture not far above the base model's loss."""
    if base is not None and axes.get_ylim()[1] > base * _HIGHEST:
        axes.set_ylim(top=base * _HIGHEST)


def _bests(axes: Axes, comparison: ComparisonFile, points: Sequence[Sequence[tuple[float, ...]]]) -> None:
    """A ring round each method's best rate."""
    for number, (method, method_points) in enumerate(zip(comparison.methods, points, strict=True)):
        for lr, median, *_ in method_points:
            if lr == method["best_lr"]:
                axes.plot([lr], [median], marker="o", markersize=12, color="none", mec=colour(number), mew=1.8)


def _broken(axes: Axes, comparison: ComparisonFile, top: float) -> None:
    """Crosses on top where runs have no loss, or one above the picture; a row for each method."""
    from matplotlib.transforms import blended_transform_factory

    place = blended_transform_factory(axes.transData, axes.transAxes)
    for number, method in enumerate(comparison.methods):
        lrs = [point["lr"] for point in method["rates"] if (value_of(point["final"]["max"]) or 0) > top]
        height = 0.98 - 0.04 * number
        axes.plot(
            lrs, [height] * len(lrs), "x", color=colour(number), markersize=5, mew=1.6, transform=place, clip_on=False
        )


def octiles(comparison: ComparisonFile) -> Chart | None:
    """Difference from the baseline by noise level."""
    series = [(number, method["octiles"]) for number, method in enumerate(comparison.methods) if method["octiles"]]
    if not series:
        return None

    def draw(axes: Axes) -> None:
        axes.axhline(0, color=INK, alpha=0.5, linewidth=1)
        for place, (number, rows) in enumerate(series):
            shift = (place - (len(series) - 1) / 2) * 0.14
            known = [row for row in rows if value_of(row["pct"]["mean"]) is not None]
            at = [row["octile"] + 1 + shift for row in known]
            for position, row in zip(at, known, strict=True):
                low, high = value_of(row["pct"]["low"]), value_of(row["pct"]["high"])
                if low is not None and high is not None:
                    axes.vlines([position], low, high, color=colour(number), linewidth=1.5)
            means = [row["pct"]["mean"] for row in known]
            axes.plot(at, means, label=comparison.labels[number], marker=_marker(number), **_style(number))
        axes.set_xticks(range(1, 9))
        axes.set_xlabel("eighth of the timesteps (8: most noise)")
        axes.set_ylabel(f"loss against {comparison.baseline}, %")
        legend(axes)

    return chart("octiles", f"Loss against {comparison.baseline} by eighths of the timesteps", draw, _TALL)


def _style(number: int) -> dict[str, Any]:
    return {"color": colour(number), "linewidth": 2, "linestyle": _LINES[number % len(_LINES)], "markersize": 5}


def _marker(number: int) -> str:
    return _MARKERS[number % len(_MARKERS)]
