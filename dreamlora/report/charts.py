"""Curves as inline SVG: the same run gives the same bytes, and the text takes the page's colour (light or dark)."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from dreamlora.report.facts import HELD_OUT_LOSS, LEARNING_RATE, TRAINING_IMAGES_LOSS, Curve, Facts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_INK = "#010203"  # stands for the page's text colour until the SVG is written
_BLUE, _ORANGE = "#3b82f6", "#f08c2e"
_SMOOTHING = 0.06
"""Width of the training loss' smoothing window as a share of the run."""
_LEAST_SPAN = 0.05
"""The evaluation's axis spans at least this share of the loss, so that a change of nothing looks like nothing."""


def evaluation_chart(facts: Facts) -> str:
    """The deterministic loss: base model as a dashed line, best step marked. Empty without an evaluation."""
    evaluation = facts.evaluation
    if evaluation is None:
        return ""
    curve = facts.curve(HELD_OUT_LOSS if evaluation.held_out else TRAINING_IMAGES_LOSS)
    images = "held-out" if evaluation.held_out else "training"

    def draw(axes: Axes) -> None:
        if evaluation.base is not None:
            axes.axhline(evaluation.base, color=_INK, alpha=0.5, linewidth=1, linestyle=(0, (4, 3)))
            axes.annotate(
                "base model",
                (1, evaluation.base),
                xycoords=("axes fraction", "data"),
                xytext=(-2, -4),
                textcoords="offset points",
                ha="right",
                va="top",
                color=_INK,
                alpha=0.8,
            )
        axes.plot(curve.steps, curve.values, color=_BLUE, linewidth=2, marker="o", markersize=3.5)
        axes.plot([evaluation.best_step], [evaluation.best], marker="o", markersize=9, color="none", mec=_ORANGE, mew=2)
        axes.annotate(
            f"best {evaluation.best:.3g}",
            (evaluation.best_step, evaluation.best),
            xytext=(0, -9),
            textcoords="offset points",
            ha="center" if evaluation.best_step < 0.85 * curve.steps[-1] else "right",
            va="top",
            color=_INK,
        )
        low, high = min(curve.values), max(curve.values)
        span = max(1.36 * (high - low), _LEAST_SPAN * high)
        axes.set_ylim((low + high - span) / 2, (low + high + span) / 2)
        axes.set_ylabel(f"loss on {images} images")

    label = (
        f"Evaluation loss by step: {curve.values[0]:.4g} at step {curve.steps[0]}, {curve.values[-1]:.4g} at the end"
    )
    return _svg("evaluation", label, draw)


def training_chart(facts: Facts) -> str:
    """The training loss, faint, and its running mean. Empty if none was logged."""
    curve = facts.curve("train/loss")
    if not curve:
        return ""

    def draw(axes: Axes) -> None:
        axes.plot(curve.steps, curve.values, color=_INK, alpha=0.22, linewidth=0.8)
        axes.plot(curve.steps, smoothed(curve), color=_ORANGE, linewidth=2)
        high = float(np.quantile(curve.values, 0.99))
        if 0 < high < max(curve.values) / 2:  # one spike must not flatten the rest
            axes.set_ylim(0, high * 1.3)
        axes.set_ylabel("training loss")

    return _svg("training", f"Training loss by step, {len(curve.steps)} values, and its running mean", draw)


def rate_chart(facts: Facts) -> str:
    """Learning rate and, on an axis of its own, the gradient norm. Empty if neither was logged."""
    rate, norm = facts.curve(LEARNING_RATE) or facts.curve("train/lr"), facts.curve("train/grad_norm")
    if not rate and not norm:
        return ""

    def draw(axes: Axes) -> None:
        if norm:
            axes.plot(norm.steps, norm.values, color=_INK, alpha=0.22, linewidth=0.8)
            axes.plot(norm.steps, smoothed(norm), color=_ORANGE, linewidth=2)
            axes.set_ylim(bottom=0)
            axes.set_ylabel("gradient norm (orange)")
        if rate:
            right = axes.twinx() if norm else axes
            right.plot(rate.steps, rate.values, color=_BLUE, linewidth=2)
            right.set_ylim(0, max(rate.values) * 1.15 or 1)
            right.set_ylabel("learning rate (blue)")
            _tidy(right)

    return _svg("rate", "Learning rate and gradient norm by step", draw)


def smoothed(curve: Curve) -> np.ndarray:
    """Running mean over a window centred on each step, narrower at the ends."""
    values = np.array(curve.values)
    half = max(1, int(len(values) * _SMOOTHING / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _svg(name: str, label: str, draw: Callable[[Axes], None]) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    style: Any = {
        "svg.hashsalt": name,
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 10,
        "path.simplify": True,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.4, 3.1), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        draw(axes)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _tidy(axes)
        target = io.StringIO()
        figure.savefig(target, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(target.getvalue(), label)


def _tidy(axes: Axes) -> None:
    axes.set_xmargin(0.02)
    axes.grid(axis="y", color=_INK, alpha=0.12, linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set(color=_INK, alpha=0.4)
    axes.tick_params(colors=_INK, length=0)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_color(_INK)


def _inline(svg: str, label: str) -> str:
    """The SVG as an element of a page: as wide as its place, with a text for those who cannot see it."""
    body = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    body = re.sub(r"<style[^>]*>.*?</style>", "", body, count=1, flags=re.DOTALL)  # it would reach the whole page
    body = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", body, count=1)
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # figure_1, axes_1, ... would be there once per chart
    body = body.replace("'sans-serif'", "sans-serif")
    return body.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1).strip()
