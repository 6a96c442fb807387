"""A sheet of paper that grows downwards: text, pictures and grey boxes. Pillow alone."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

PAPER = (252, 252, 250)
INK = (32, 33, 36)
FAINT = (120, 122, 128)
MISSING = (232, 232, 229)
ACCENT = (66, 103, 178)
MARGIN = 24
GAP = 8
LABEL = 18
TITLE = 24
SMALL = 14
LINE = 1.3
"""Line height, in font sizes."""

Cell = Image.Image | str
"""A picture that fits the cell, or the reason why there is none."""
Lines = list[str]


Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@functools.cache
def font(size: int) -> Font:
    """Pillow's own font; it is everywhere, and knows Latin letters only."""
    return ImageFont.load_default(size=size)


def line_height(size: int) -> int:
    """Distance of two lines in pixels."""
    return round(size * LINE)


def wrap(text: str, face: Font, width: int, most: int) -> Lines:
    """Break at spaces into at most ``most`` lines of ``width`` pixels; what does not fit ends in an ellipsis."""
    lines: Lines = []
    current = ""
    for word in text.split():
        pieces = _pieces(word, face, width)
        for number, piece in enumerate(pieces):
            joined = f"{current} {piece}" if current and number == 0 else piece
            if current and (number > 0 or face.getlength(joined) > width):
                lines.append(current)
                joined = piece
            current = joined
    lines.append(current)
    if len(lines) <= most:
        return lines
    last = lines[most - 1]
    while last and face.getlength(last + "…") > width:
        last = last[:-1]
    return [*lines[: most - 1], last.rstrip(" ,.") + "…"]


def _pieces(word: str, face: Font, width: int) -> Lines:
    """A word cut into pieces that fit."""
    pieces = [""]
    for letter in word:
        if pieces[-1] and face.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces


class Canvas:
    """Draws downwards from the top margin; ``finish`` cuts the sheet.

    Args:
        width: in pixels.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._y = MARGIN
        self._sheet = Image.new("RGB", (width, 512), PAPER)

    def skip(self, pixels: int) -> None:
        """Leave room."""
        self._y += pixels

    def text(self, x: int, lines: Lines, size: int, ink: tuple[int, int, int]) -> None:
        """Lines of text from the current height on."""
        self._reserve(len(lines) * line_height(size))
        self._lines(x, self._y, lines, size, ink)
        self._y += len(lines) * line_height(size)

    def headings(self, x: int, width: int, headings: Sequence[Lines]) -> None:
        """Column headings, bottom-aligned, ``width`` pixels each."""
        height = max((len(lines) for lines in headings), default=0) * line_height(LABEL)
        self._reserve(height + GAP)
        for number, lines in enumerate(headings):
            top = self._y + height - len(lines) * line_height(LABEL)
            self._lines(x + number * (width + GAP), top, lines, LABEL, INK)
        self._y += height + GAP

    def row(self, label: Lines, gutter: int, size: tuple[int, int], cells: Sequence[Cell]) -> None:
        """A label and cells of ``size`` pixels; grey boxes stand for what is missing."""
        width, height = size
        self._reserve(height + GAP)
        self._label(label, height)
        pen = ImageDraw.Draw(self._sheet)
        for number, cell in enumerate(cells):
            left = MARGIN + gutter + number * (width + GAP)
            if isinstance(cell, str):
                pen.rectangle((left, self._y, left + width - 1, self._y + height - 1), fill=MISSING)
                self._centred(left, width, height, wrap(cell, font(SMALL), width - 16, max(height // 16 - 1, 1)))
            else:
                place = (left + (width - cell.width) // 2, self._y + (height - cell.height) // 2)
                self._sheet.paste(cell, place)
        self._y += height + GAP

    def strip(self, label: Lines, gutter: int, height: int, images: Sequence[Image.Image]) -> None:
        """A label and pictures side by side, with a rule below."""
        self._reserve(height + 40)
        self._label(label, height)
        x = MARGIN + gutter
        for image in images:
            self._sheet.paste(image, (x, self._y + (height - image.height) // 2))
            x += image.width + GAP
        self._y += height + 16
        ImageDraw.Draw(self._sheet).line((MARGIN, self._y, self.width - MARGIN - 1, self._y), fill=MISSING)
        self._y += 14

    def progress(self, left: int, right: int, done: float) -> None:
        """A thin bar."""
        self._reserve(20)
        pen = ImageDraw.Draw(self._sheet)
        top = self._y + 4
        pen.rectangle((left, top, right - 1, top + 3), fill=MISSING)
        pen.rectangle((left, top, left + round((right - 1 - left) * done), top + 3), fill=ACCENT)
        self._y += 12

    def note(self, lines: Lines) -> None:
        """Small print."""
        self.skip(8)
        self.text(MARGIN, lines, SMALL, FAINT)

    def finish(self) -> Image.Image:
        """The sheet, cut below the last line."""
        self._reserve(MARGIN)
        return self._sheet.crop((0, 0, self.width, self._y + MARGIN - GAP))

    def _reserve(self, pixels: int) -> None:
        needed = self._y + pixels + MARGIN
        if needed > self._sheet.height:
            taller = Image.new("RGB", (self.width, needed * 2), PAPER)
            taller.paste(self._sheet, (0, 0))
            self._sheet = taller

    def _lines(self, x: int, y: int, lines: Lines, size: int, ink: tuple[int, int, int]) -> None:
        pen = ImageDraw.Draw(self._sheet)
        for number, line in enumerate(lines):
            pen.text((x, y + number * line_height(size)), line, fill=ink, font=font(size))

    def _label(self, lines: Lines, height: int) -> None:
        """Centred on a row of ``height`` pixels."""
        top = self._y + (height - len(lines) * line_height(LABEL)) // 2
        self._lines(MARGIN, top, lines, LABEL, INK)

    def _centred(self, left: int, width: int, height: int, lines: Lines) -> None:
        top = self._y + (height - len(lines) * line_height(SMALL)) // 2
        for number, line in enumerate(lines):
            x = left + (width - round(font(SMALL).getlength(line))) // 2
            self._lines(x, top + number * line_height(SMALL), [line], SMALL, FAINT)
