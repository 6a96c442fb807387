"""Pictures made small enough to lie inside the page."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

_GRID_PIXELS = 1600
_REFERENCE_PIXELS = 160
_REFERENCES = 8
_TIMELAPSE_BYTES = 4_000_000
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


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


def embedded(file: Path, longest: int = _GRID_PIXELS) -> Picture | None:
    """A picture as WebP, shrunk if it is larger than ``longest``; None if it is missing or cannot be read."""
    try:
        with Image.open(file) as image:
            image.load()
            picture = image.convert("RGB")
    except (OSError, ValueError):
        return None
    picture.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return _picture(picture)


def references(folder: Path) -> list[Picture]:
    """The first training images as thumbnails."""
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in _SUFFIXES)
    return [picture for file in files[:_REFERENCES] if (picture := embedded(file, _REFERENCE_PIXELS))]


def timelapse(file: Path) -> tuple[Picture, Picture] | None:
    """The animation as it is and its last frame; None if it is missing, unreadable or too large to embed."""
    try:
        if file.stat().st_size > _TIMELAPSE_BYTES:
            return None
        with Image.open(file) as image:
            image.seek(getattr(image, "n_frames", 1) - 1)
            last = image.convert("RGB")
    except (OSError, ValueError, EOFError):
        return None
    return Picture(_address(file.read_bytes()), *last.size), _picture(last)


def _picture(image: Image.Image) -> Picture:
    target = io.BytesIO()
    image.save(target, "WEBP", quality=85, method=4)
    return Picture(_address(target.getvalue()), *image.size)


def _address(content: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(content).decode()}"
