"""Pictures made small enough to lie inside the page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dreamlora.pictures import BrokenImage, own_film, own_picture

_GRID_PIXELS = 1600
_REFERENCE_PIXELS = 160
_REFERENCES = 8
_TIMELAPSE_BYTES = 4_000_000


@dataclass(frozen=True)
class Picture:
    """An embedded picture.

    Attributes:
        data: ``data:`` address.
        width, height: of the embedded one, so that the page does not jump while it loads.
    """

    data: str
    width: int
    height: int


def embedded(file: Path, longest: int = _GRID_PIXELS, inside: Path | None = None) -> Picture | None:
    """A run's picture as WebP, shrunk if it is larger than ``longest``; None if it is missing or cannot be read.

    ``inside`` is the folder that it must lie in once all links are followed.
    """
    try:
        picture = own_picture(file, inside)
    except (FileNotFoundError, BrokenImage):
        return None
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return _picture(picture)


def references(folder: Path, inside: Path | None = None) -> list[Picture]:
    """The first training images as thumbnails."""
    files = sorted(folder.glob("*.png"))
    return [picture for file in files[:_REFERENCES] if (picture := embedded(file, _REFERENCE_PIXELS, inside))]


def timelapse(file: Path, inside: Path | None = None) -> tuple[Picture, Picture] | None:
    """The animation as it is and its last frame; None if it is missing, no WebP or too large to embed."""
    try:
        content, last = own_film(file, _TIMELAPSE_BYTES, inside)
    except (FileNotFoundError, BrokenImage):
        return None
    return Picture(_address(content), *last.size), _picture(last)


def _picture(image: Image.Image) -> Picture:
    target = io.BytesIO()
    image.save(target, "WEBP", quality=85, method=4)
    return Picture(_address(target.getvalue()), *image.size)


def _address(content: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(content).decode()}"
