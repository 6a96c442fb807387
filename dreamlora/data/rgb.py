"""The pixels of an image of any mode of Pillow as 8-bit sRGB on white, and what they let through."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np
from PIL import Image

from dreamlora.data import colour

Box = tuple[int, int, int, int]
"""Left, top, right and bottom."""


class Opacity(IntEnum):
    """How much of an image is opaque: all of it, not all, or nothing (every pixel lets all through)."""

    ALL = 0
    PARTLY = 1
    NOTHING = 2


class Converted(NamedTuple):
    """An image in RGB, whether it has a profile that cannot be used, and how much of it was opaque."""

    image: Image.Image
    profile_unused: bool
    opacity: Opacity


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit sRGB: transparency on white, deep grey scaled (not clipped), colours converted by an embedded profile.

    Colours without a profile, or with one that cannot be used, are taken for sRGB (CMYK: as Pillow converts it).
    """
    return converted(image).image


def converted(image: Image.Image) -> Converted:
    """The image as ``to_rgb`` gives it, and what else is known of it then."""
    deep = image.mode.startswith(("I", "F"))
    seen_through = _lets_through(image)
    mode = image.mode
    if deep or mode in _GREY:
        mode = "L"
    elif seen_through:
        mode = "RGB"
    profile_unused = False
    try:
        to_srgb = colour.to_srgb(image.info.get("icc_profile"), mode)
    except colour.UnusableProfile:
        to_srgb, profile_unused = colour.to_srgb(None, mode), True
    if to_srgb is None and image.mode == "RGB" and not seen_through:
        image = image.convert("RGB")
        image.info.pop("icc_profile", None)  # it is no longer true
        return Converted(image, profile_unused, Opacity.ALL)
    top = _top(image) if deep else 0.0
    ranges: list[tuple[int, int]] = []

    def of_piece(piece: Image.Image) -> Image.Image:
        channel = None
        if deep:
            piece = _eight_bit(piece, top)
        elif seen_through:
            piece, channel = _parted(piece)
            values = np.asarray(channel)
            ranges.append((int(values.min()), int(values.max())))
        piece = (to_srgb(piece) if to_srgb else piece).convert("RGB")
        return _on_white(piece, channel) if channel else piece

    return Converted(_in_pieces(image, of_piece), profile_unused, _opacity(ranges))


def alpha_pieces(image: Image.Image) -> Iterator[tuple[Box, Image.Image]]:
    """The alpha channel of an image, box by box; nothing where it has none."""
    if _lets_through(image):
        for box in _boxes(image.size):
            yield box, _parted(image.crop(box))[1]


def _lets_through(image: Image.Image) -> bool:
    """Whether an open image has an alpha channel, or a colour that is transparent."""
    return not image.mode.startswith(("I", "F")) and image.has_transparency_data


def _opacity(ranges: Sequence[tuple[int, int]]) -> Opacity:
    """By the least and the largest alpha of every piece of an image; none for one that has no alpha."""
    if all(low == 255 for low, _ in ranges):
        return Opacity.ALL
    return Opacity.PARTLY if any(high for _, high in ranges) else Opacity.NOTHING


_GREY = ("1", "L", "LA", "La")
_PIECE = 2**20
"""Pixels that are converted at once: on the way they take several times the memory of the image."""


def _in_pieces(image: Image.Image, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """The RGB image that ``convert``, which looks at single pixels, makes of all."""
    result = Image.new("RGB", image.size)
    for box in _boxes(image.size):
        result.paste(convert(image.crop(box)), box)
    return result


def _boxes(size: tuple[int, int]) -> Iterator[Box]:
    """Left, top, right and bottom of pieces that cover an image; a side has fewer pixels than a piece can have."""
    width, height = size
    rows = max(_PIECE // width, 1)
    for top in range(0, height, rows):
        yield 0, top, width, min(top + rows, height)


def _parted(image: Image.Image) -> tuple[Image.Image, Image.Image]:
    """The image without its transparency, in L or RGB, and its transparency."""
    full = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return full.getchannel("R") if image.mode in _GREY else full.convert("RGB"), full.getchannel("A")


def _on_white(image: Image.Image, alpha: Image.Image) -> Image.Image:
    image.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def _top(image: Image.Image) -> float:
    """The end of the range of the modes I;16, I and F: 16 bit, more if values need it, 0 to 1 for floats."""
    if image.mode.startswith("I;"):
        return 65535.0
    largest = -np.inf
    for box in _boxes(image.size):
        values = np.asarray(image.crop(box))
        if not np.isfinite(values).all():
            raise ValueError("it has pixels that are not finite numbers")
        largest = max(largest, float(values.max()))
    ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0, 2.0**31 - 1)
    return next((top for top in ranges if largest <= top), ranges[-1])


def _eight_bit(image: Image.Image, top: float) -> Image.Image:
    """Modes I;16, I and F as L, where ``top`` becomes 255."""
    values = np.asarray(image).astype(np.float64)
    return Image.fromarray(np.clip(np.rint(values * (255 / top)), 0, 255).astype(np.uint8))
