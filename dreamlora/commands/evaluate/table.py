"""Measurements as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dreamlora import metrics
from dreamlora.escapes import message, one_line
from dreamlora.evaluation.measure import Measurement, Value
from dreamlora.figures import NONE, change, loss, score
from dreamlora.interfaces import ImageMetric
from dreamlora.metric_names import COPIES, EVAL_LOSS, main_values, of_metric, short


def table(rows: Mapping[str, Measurement]) -> str:
    """One line per row, the base model's first, one column per metric; below, what the columns are, and the notes."""
    names = _columns(rows)
    if not names:
        return "\n".join(_notes(rows))
    about = metrics.by_value()
    base = next(iter(rows.values()))
    heads = [short(name) + (" ↑" if _higher_is_better(about.get(name)) else " ↓") for name in names]
    cells = [[_shown(label), *(_cell(row, name, base) for name in names)] for label, row in rows.items()]
    grid = [["", *heads], *cells]
    widths = [max(len(line[column]) for line in grid) for column in range(len(grid[0]))]
    lines = [
        "  ".join(cell.ljust(width) if not column else cell.rjust(width) for column, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(line, widths, strict=True)) for line in grid)
    ]
    legend = [_legend(name, rows, about.get(name)) for name in names]
    return "\n".join([*(line.rstrip() for line in lines), "", *legend, *_notes(rows)])


def _shown(label: str) -> str:
    return one_line(label.replace("\n", ", "))


def _higher_is_better(metric: ImageMetric | None) -> bool:
    """A column that is of no image metric has the evaluation loss."""
    return metric is not None and metric.HIGHER_IS_BETTER


def _columns(rows: Mapping[str, Measurement]) -> list[str]:
    return main_values(value.name for measured in rows.values() for value in measured.values)


def _value(measured: Measurement, name: str) -> Value | None:
    return next((value for value in measured.values if value.name == name), None)


def _cell(measured: Measurement, name: str, base: Measurement) -> str:
    value = _value(measured, name)
    if value is None:
        return NONE
    if name == EVAL_LOSS:
        before = _value(base, name)
        against = f" ({change(value.value, before.value)})" if before and before is not value else ""
        return loss(value.value) + against
    beginning = of_metric(name, "")
    parts = {one.name.removeprefix(beginning): one.value for one in measured.values if one.name.startswith(beginning)}
    return score(value.value) + "".join(_part(part, said) for part, said in parts.items())


def _part(part: str, value: float) -> str:
    """What a metric says besides its main value, behind it."""
    if part == COPIES:
        return " copies!" if value else ""
    return f" ({part} {value:.3f})"


def _legend(name: str, rows: Mapping[str, Measurement], metric: ImageMetric | None) -> str:
    values = [value for measured in rows.values() if (value := _value(measured, name))]
    counts = sorted({(value.n, value.n_other) for value in values})
    counted = " or ".join(str(n) if other is None else f"{n} against {other}" for n, other in counts)
    encoders = ", ".join(dict.fromkeys(value.encoder_id for value in values))
    if metric is None:
        return f"{name}: {counted} items, {encoders}; in brackets: against the base model"
    never = "" if metric.SELECTS else "; never choose by it"
    return f"{short(name)}: {counted} images, {encoders}{never}"


def _notes(rows: Mapping[str, Measurement]) -> list[str]:
    by_note: dict[str, list[str]] = {}
    for label, measured in rows.items():
        for note in measured.notes:
            by_note.setdefault(note, []).append(_shown(label))
    return [
        message(f"note: {note}") + ("" if len(labels) == len(rows) else f" ({_few(labels)})")
        for note, labels in by_note.items()
    ]


def _few(labels: Sequence[str]) -> str:
    return ", ".join(labels[:3]) + (", ..." if len(labels) > 3 else "")
