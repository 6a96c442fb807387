"""Charts as SVG: the same numbers give the same bytes, and the text takes the page's colour (light or dark)."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dreamlora.escapes import Markup, html, markup, one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"
"""Stands for the page's text colour until the SVG is written."""
WIDTH = 4.5
"""Inches: few enough that a chart as wide as a telephone has text of 10 pixels."""
_LEGEND_ROW = 0.21  # inches
LINE = 0.17  # inches
_LETTERS, _UPRIGHT_LETTERS = 52, 32
"""In a line of a text, which may run upwards beside an axis."""
_LONGEST = 150
"""Letters of a text in a chart."""
_BREAKS = re.compile(r"(?<=,)(?=[A-Za-z])|(?<=[: ])|(?=\+[A-Za-z])")
"""Where a line may end: between the parts of a method's name, or words."""
_MARKERS = 500
"""On a line: each is an element of the page, while a line with ever so many points is simplified."""
_PAGE_INK, _PAGE_PAPER = "#1b2230", "#ffffff"


@dataclass(frozen=True)
class Chart:
    """A drawn chart.

    Attributes:
        name: of its file, and what its ids are made from, so that those of different charts do not clash.
        label: a text for those who cannot see it.
        drawn: as matplotlib wrote it.
    """

    name: str
    label: str
    drawn: str

    @property
    def inline(self) -> Markup:
        """As an element of a page, as wide as its place."""
        body = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", self._bare, count=1)
        body = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", body, count=1)
        return markup(self._labelled(body.replace(INK, "currentColor")))

    @property
    def file(self) -> str:
        """As a file of its own, dark on white: what shows it may be dark and know nothing of our colours."""
        paper = f'<rect width="100%" height="100%" fill="{_PAGE_PAPER}"/>'
        body = re.sub(r"(<svg[^>]*>)", rf"\1{paper}", self._bare.replace(INK, _PAGE_INK), count=1)
        return f'<?xml version="1.0" encoding="utf-8"?>\n{self._labelled(body)}\n'

    @property
    def _bare(self) -> str:
        body = self.drawn[self.drawn.index("<svg") :]
        body = re.sub(r"<style[^>]*>.*?</style>", "", body, count=1, flags=re.DOTALL)  # it would reach the whole page
        body = re.sub(r'<g id="[^"]*"', "<g", body)  # figure_1, axes_1, ... would be there once per chart
        return body.replace("'sans-serif'", "sans-serif")

    def _labelled(self, body: str) -> str:
        return body.replace("<svg", f'<svg role="img" aria-label="{html(self.label)}"', 1).strip()


def chart(name: str, label: str, draw: Callable[[Axes], None], size: tuple[float, float] = (WIDTH, 2.7)) -> Chart:
    """Draw a chart on axes that are tidied up afterwards.

    Args:
        size: width and height in inches, at 72 pixels to the inch.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {
        "svg.hashsalt": name,
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "font.size": 10,
        "path.simplify": True,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.patch.set_alpha(0)
        draw(axes)
        tidy(axes)
        _bound(figure)
        target = io.StringIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")  # of this font; the page's reader has others
            warnings.filterwarnings("ignore", "constrained_layout not applied")  # beside names that are so long
            figure.savefig(target, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return Chart(name, label, target.getvalue())


def _bound(figure: Figure) -> None:
    """Show texts as they are, without formulas, and not more markers than can be told apart."""
    from matplotlib.lines import Line2D
    from matplotlib.text import Text

    artists: list[Any] = figure.findobj()
    for artist in artists:
        if isinstance(artist, Text) and artist.get_text():  # not of ticks, whose texts come later
            upright = 45 < artist.get_rotation() % 180 < 135
            artist.set_text("\n".join(lines_of(artist.get_text(), _UPRIGHT_LETTERS if upright else _LETTERS)))
            artist.set_parse_math(False)
        elif isinstance(artist, Line2D) and (count := np.size(artist.get_xdata())) > _MARKERS:
            artist.set_markevery(1 + count // _MARKERS)


def lines_of(text: str, letters: int = _LETTERS) -> list[str]:
    """A text of a chart, which may be a method's name, as it is drawn: in lines that are no wider than the chart."""
    flat = one_line(text)
    flat = flat if len(flat) <= _LONGEST else f"{flat[: _LONGEST - 1]}…"
    lines = [""]
    for part in _BREAKS.split(flat):
        for piece in (part[start : start + letters] for start in range(0, len(part), letters)):
            if len(lines[-1]) + len(piece.rstrip()) > letters:
                lines.append("")
            lines[-1] += piece
    return lines


def legend(axes: Axes) -> None:
    """The names of the lines above the chart, in as many columns as there is room for; more rows make it higher."""
    handles, names = axes.get_legend_handles_labels()
    lines = [line for name in names for line in lines_of(name)]
    columns = max(1, _LETTERS // (max(map(len, lines), default=0) + 7))
    figure: Any = axes.figure
    figure.legend(handles, names, loc="outside upper left", ncols=columns, frameon=False, labelcolor=INK)
    rows = -(-len(lines) // columns)
    figure.set_figheight(figure.get_figheight() + _LEGEND_ROW * max(0, rows - 2))


def by_step(axes: Axes) -> None:
    """The horizontal axis counts steps."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def tidy(axes: Axes) -> None:
    """Grid, frame and text in the page's manner."""
    axes.set_xmargin(0.02)
    axes.grid(axis="y", color=INK, alpha=0.12, linewidth=0.8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set(color=INK, alpha=0.4)
    axes.tick_params(which="both", colors=INK, length=0)
    for text in (axes.xaxis.label, axes.yaxis.label):
        text.set_color(INK)


def level(axes: Axes, height: float, text: str, corner: str = "below right") -> None:
    """A dashed line across the chart, named at one of its ends, above or below it."""
    side, left = corner.split()[0], corner.endswith("left")
    axes.axhline(height, color=INK, alpha=0.5, linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        text,
        (0 if left else 1, height),
        xycoords=("axes fraction", "data"),
        xytext=(2 if left else -2, 3 if side == "above" else -4),
        textcoords="offset points",
        ha="left" if left else "right",
        va="bottom" if side == "above" else "top",
        color=INK,
        alpha=0.8,
    )
