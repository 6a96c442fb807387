"""Measurements as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dreamlora import registry
from dreamlora.evaluation.measure import Measurement, Value, load_metric
from dreamlora.interfaces import ImageMetric
from dreamlora.metric_names import relative, short

HIDDEN = ("_p", "_negative", relative(""))
"""Ends of the names of values that belong to another: shown with it."""


def table(rows: Mapping[str, Measurement]) -> str:
    """One line per row, one column per metric; below, what the columns are, and the notes."""
    names = _columns(rows)
    if not names:
        return "\n".join(_notes(rows))
    about = {load_metric(name).NAME: load_metric(name) for name in registry.names("metrics")}
    heads = [short(name) + (" ↑" if _higher_is_better(about.get(name)) else " ↓") for name in names]
    cells = [[label.replace("\n", ", "), *(_cell(found, name) for name in names)] for label, found in rows.items()]
    grid = [["", *heads], *cells]
    widths = [max(len(line[column]) for line in grid) for column in range(len(grid[0]))]
    lines = [
        "  ".join(cell.ljust(width) if not column else cell.rjust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in grid)
    ]
    legend = [_legend(name, rows, about.get(name)) for name in names]
    return "\n".join([*(line.rstrip() for line in lines), "", *legend, *_notes(rows)])


def _higher_is_better(metric: ImageMetric | None) -> bool:
    """A column that is of no image metric has the evaluation loss."""
    return metric is not None and metric.HIGHER_IS_BETTER


def _columns(rows: Mapping[str, Measurement]) -> list[str]:
    found = [value.name for measured in rows.values() for value in measured.values]
    return [name for name in dict.fromkeys(found) if not name.endswith(HIDDEN)]


def _value(measured: Measurement, name: str) -> Value | None:
    return next((value for value in measured.values if value.name == name), None)


def _cell(measured: Measurement, name: str) -> str:
    value = _value(measured, name)
    if value is None:
        return "-"
    p = _value(measured, f"{name}_p")
    negative = _value(measured, f"{name}_negative")
    alarm = " copies!" if negative and negative.value else ""
    ratio = _value(measured, relative(name))
    against_base = f" ({ratio.value - 1:+.1%})" if ratio and ratio.value != 1 else ""
    return f"{value.value:.4f}" + (f" (p {p.value:.3f})" if p else "") + alarm + against_base


def _legend(name: str, rows: Mapping[str, Measurement], metric: ImageMetric | None) -> str:
    values = [value for measured in rows.values() if (value := _value(measured, name))]
    counts = sorted({(value.n, value.n_other) for value in values})
    counted = " or ".join(str(n) if other is None else f"{n} against {other}" for n, other in counts)
    encoders = ", ".join(dict.fromkeys(value.encoder_id for value in values))
    if metric is None:
        return f"{name}: {counted} items, {encoders}; in brackets: mean over the items, to the base model"
    never = "" if metric.SELECTS else "; never choose by it"
    return f"{short(name)}: {counted} images, {encoders}{never}"


def _notes(rows: Mapping[str, Measurement]) -> list[str]:
    by_note: dict[str, list[str]] = {}
    for label, measured in rows.items():
        for note in measured.notes:
            by_note.setdefault(note, []).append(label.replace("\n", ", "))
    return [
        f"note: {note}" + ("" if len(labels) == len(rows) else f" ({_few(labels)})") for note, labels in by_note.items()
    ]


def _few(labels: Sequence[str]) -> str:
    return ", ".join(labels[:3]) + (", ..." if len(labels) > 3 else "")
