"""The curves of one run."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from dreamlora import metrics
from dreamlora.metric_names import (
    DW_NORM,
    GRAD_NORM,
    LEARNING_RATE,
    OTHER_IMAGES,
    TRAIN_LOSS,
    UPDATE_RMS,
    main_values,
    raw,
    short,
)
from dreamlora.report.facts import (
    Curve,
    ImageMetricCurve,
    RunFacts,
)
from dreamlora.report.svg import INK, by_step, chart, legend, level, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _ORANGE, _GREEN = "#3b82f6", "#f08c2e", "#2fa36b"
_GROUPS = (_BLUE, _ORANGE, _GREEN, "#a06cd5", "#d64f7a", "#7a8699")
"""Colours of layer groups; a seventh begins anew with dashes."""
_MOST = 24
"""Layer groups in a chart, and charts of image metrics: a model has some ten, a file of metrics may name any number."""
_SMOOTHING = 0.06
"""Width of the training loss' smoothing window as a share of the run."""
_LEAST_SPAN = 0.05
"""The evaluation's axis spans at least this share of the loss, so that a change of nothing looks like nothing."""
_FLAT = 1e-30
"""... and this much, where all of them are 0."""


def evaluation_chart(facts: RunFacts) -> str:
    """The deterministic loss: base model as a dashed line, best checkpoint marked; and that of the weights without
    their moving average, if there is one. Empty without an evaluation.
    """
    evaluation = facts.evaluation
    if evaluation is None:
        return ""
    curve, other = facts.curve(evaluation.metric), facts.curve(raw(evaluation.metric))
    images = "held-out" if evaluation.held_out else "training"
    values = dict(zip(curve.steps, curve.values, strict=True))
    best_step = facts.selection.get("step")
    best_step = best_step if best_step in values else evaluation.best_step
    best = values[best_step]

    def draw(axes: Axes) -> None:
        if evaluation.base is not None:
            level(axes, evaluation.base, facts.base)
        [line] = axes.plot(curve.steps, curve.values, color=_BLUE, linewidth=2, marker="o", markersize=3.5)
        if other:
            line.set_label("moving average")
            thin: Any = {"linewidth": 1.2, "marker": "o", "markersize": 2}
            axes.plot(other.steps, other.values, color=_GREEN, label="without it", **thin)
            legend(axes)
        axes.plot([best_step], [best], marker="o", markersize=9, color="none", mec=_ORANGE, mew=2)
        axes.annotate(
            f"best {best:.3g}",
            (best_step, best),
            xytext=(0, -9),
            textcoords="offset points",
            ha="center" if best_step < 0.85 * curve.steps[-1] else "right",
            va="top",
            color=INK,
        )
        low, high = min(curve.values + other.values), max(curve.values + other.values)
        span = max(1.36 * (high - low), _LEAST_SPAN * abs(high), _FLAT)
        axes.set_ylim((low + high - span) / 2, (low + high + span) / 2)
        axes.set_ylabel(f"loss on {images} images")
        by_step(axes)

    label = (
        f"Evaluation loss by step: {curve.values[0]:.4g} at step {curve.steps[0]}, {curve.values[-1]:.4g} at the end"
    )
    return chart("evaluation", label, draw).inline


def training_chart(facts: RunFacts) -> str:
    """The training loss, faint, and its running mean. Empty if none was logged."""
    curve = facts.curve(TRAIN_LOSS)
    if not curve:
        return ""

    def draw(axes: Axes) -> None:
        axes.plot(curve.steps, curve.values, color=INK, alpha=0.22, linewidth=0.8)
        axes.plot(curve.steps, smoothed(curve), color=_ORANGE, linewidth=2)
        high = float(np.quantile(curve.values, 0.99))
        if 0 < high < max(curve.values) / 2:  # one spike must not flatten the rest
            axes.set_ylim(0, high * 1.3)
        axes.set_ylabel("training loss")
        by_step(axes)

    return chart("training", f"Training loss by step, {len(curve.steps)} values, and its running mean", draw).inline


def rate_chart(facts: RunFacts) -> str:
    """Learning rate and, on an axis of its own, the gradient norm. Empty if neither was logged."""
    rate, norm = facts.curve(LEARNING_RATE), facts.curve(GRAD_NORM)
    if not rate and not norm:
        return ""

    def draw(axes: Axes) -> None:
        if norm:
            axes.plot(norm.steps, norm.values, color=INK, alpha=0.22, linewidth=0.8)
            axes.plot(norm.steps, smoothed(norm), color=_ORANGE, linewidth=2)
            axes.set_ylim(bottom=0)
            axes.set_ylabel("gradient norm (orange)")
        if rate:
            right = axes.twinx() if norm else axes
            right.plot(rate.steps, rate.values, color=_BLUE, linewidth=2)
            right.set_ylim(0, max(rate.values) * 1.15 or 1)
            right.set_ylabel("learning rate (blue)")
            tidy(right)
        by_step(axes)

    return chart("rate", "Learning rate and gradient norm by step", draw).inline


def change_chart(facts: RunFacts) -> str:
    """``‖ΔW‖`` by layer group. Empty if it was not logged."""
    label = "Norm of the change of the weights by step and layer group"
    return _groups_chart("change", label, facts.groups(DW_NORM), "‖ΔW‖", log=False)


def update_chart(facts: RunFacts) -> str:
    """Root mean square of one step's change of the weights by layer group. Empty if it was not logged."""
    label = "Root mean square of one step's change of the weights by layer group"
    return _groups_chart("update", label, facts.groups(UPDATE_RMS), "RMS change in one step", log=True)


def _groups_chart(name: str, label: str, groups: dict[str, Curve], ylabel: str, *, log: bool) -> str:
    if not groups:
        return ""
    if len(groups) > _MOST:
        ylabel += f", {_MOST} of {len(groups)} groups"
        groups = dict(islice(groups.items(), _MOST))

    def draw(axes: Axes) -> None:
        for number, (group, curve) in enumerate(groups.items()):
            style: Any = "-" if number < len(_GROUPS) else (0, (4, 2))
            colour = _GROUPS[number % len(_GROUPS)]
            marker = "o" if len(curve.steps) == 1 else None
            axes.plot(curve.steps, curve.values, color=colour, linewidth=2, linestyle=style, marker=marker, label=group)
        if log and all(value > 0 for curve in groups.values() for value in curve.values):
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        if len(groups) > 1:
            axes.legend(frameon=False, labelcolor=INK, fontsize=9, ncols=2)
        axes.set_ylabel(ylabel)
        by_step(axes)

    return chart(name, label, draw).inline


def image_charts(facts: RunFacts) -> list[tuple[str, str]]:
    """Caption and curve of every image metric that was measured at least twice: step by step, selection marked.

    The caption is what the plug-in says, or the bare name if a plug-in measured it that is not installed here.
    """
    plugins = metrics.by_value()
    measured = {metric.name: metric for metric in facts.image_metrics}
    names = [name for name in main_values(measured) if len(measured[name].curve.steps) > 1 or measured[name].earlier]
    return [
        (
            (plugins[name].ABOUT if name in plugins else short(name)) + _about_earlier(measured[name]),
            _image_chart(measured[name], facts.selection.get("step")),
        )
        for name in names[:_MOST]
    ]


def _about_earlier(metric: ImageMetricCurve) -> str:
    if not metric.earlier:
        return ""
    until = max(curve.steps[-1] for curve in metric.earlier)
    return f". Grey: values until step {until}, {OTHER_IMAGES}; not to be compared with the blue ones"


def _image_chart(metric: ImageMetricCurve, best_step: int | None) -> str:
    curve, name = metric.curve, short(metric.name)

    def draw(axes: Axes) -> None:
        if curve.steps[0] == 0:
            axes.axhline(curve.values[0], color=INK, alpha=0.5, linewidth=1, linestyle=(0, (4, 3)))
        if best_step is not None:
            axes.axvline(best_step, color=_ORANGE, linewidth=1.5, alpha=0.8)
        for earlier in metric.earlier:
            axes.plot(earlier.steps, earlier.values, color=INK, alpha=0.35, linewidth=2, marker="o", markersize=3.5)
        axes.plot(curve.steps, curve.values, color=_BLUE, linewidth=2, marker="o", markersize=3.5)
        axes.set_ylabel(f"{name} (n = {metric.n})")
        by_step(axes)

    label = f"{name} by step: {curve.values[0]:.3g} at step {curve.steps[0]}, {curve.values[-1]:.3g} at the end"
    return chart(f"image-{name}", label, draw).inline


def smoothed(curve: Curve) -> np.ndarray:
    """Running mean over a window centred on each step, narrower at the ends."""
    values = np.array(curve.values)
    half = max(1, int(len(values) * _SMOOTHING / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)
