"""One image: how any file becomes upright 8-bit RGB, and the record that training knows it by."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

from dreamlora.errors import UserError

FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".gif": "GIF",
    ".avif": "AVIF",
    ".heic": "HEIF",
    ".heif": "HEIF",
}
"""Suffixes of images, and Pillow's name of the format. Pillow reads AVIF from 11.3 on and HEIF only with a plug-in."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageFacts(NamedTuple):
    """What is known of an image without decoding it.

    Attributes:
        content_hash: SHA-256 of the file's bytes, in hexadecimal.
        size: width and height in pixels, upright.
    """

    content_hash: str
    size: tuple[int, int]


@dataclass(frozen=True)
class ImageRecord:
    """An image and its caption; the image stays on disk until ``open``.

    Attributes:
        name: short name for reports: the file's path inside its folder, or the row of a data set.
        caption: what the image shows; never empty. Of several, the first.
        read: gives the bytes of the image file; can be pickled.
        where: full path, or data set and row, for error messages.
        known: hash and size, where these were found out before.
        other_captions: more of them, of which one is drawn each time the image is seen.
        dataset: number of its data set in the run.
        mask: another image of the same shape: where it is white, the image is learned.
    """

    name: str
    caption: str
    read: Callable[[], bytes]
    where: str
    known: ImageFacts | None = None
    dataset: int = 0
    mask: ImageRecord | None = None
    other_captions: tuple[str, ...] = ()

    @property
    def captions(self) -> tuple[str, ...]:
        """All of them, at least one."""
        return (self.caption, *self.other_captions)

    @classmethod
    def from_image(cls, name: str, caption: str, image: Image.Image) -> ImageRecord:
        """A record of an image in memory. Its hash depends on the pixels alone, not on any library's version."""
        image = to_rgb(image)
        header = f"P6 {image.width} {image.height} 255\n".encode()
        return cls(name, caption, _Constant(header + image.tobytes()), name)

    def load(self) -> bytes:
        """The bytes of the image file.

        Raises:
            UserError: it cannot be read.
        """
        try:
            return self.read()
        except OSError as error:
            raise UserError(f"cannot read the image {self.where}: {error.strerror or error}") from error

    def open(self) -> Image.Image:
        """The upright RGB image.

        Raises:
            UserError: it cannot be read, or is broken.
        """
        return decode(self.load(), self.where)

    @cached_property
    def facts(self) -> ImageFacts:
        """Hash and size. Reads the file once, if they are not known; what was read then stays the answer.

        Raises:
            UserError: it cannot be read, or is no image.
        """
        if self.known is not None:
            return self.known
        data = self.load()
        return ImageFacts(hashlib.sha256(data).hexdigest(), upright_size(data, self.where))

    def content_hash(self) -> str:
        """SHA-256 of the file's bytes, in hexadecimal."""
        return self.facts.content_hash


@dataclass(frozen=True)
class _Constant:
    value: bytes

    def __call__(self) -> bytes:
        return self.value


def readable(file: Path) -> bool:
    """Whether the installed Pillow can read images with this file's suffix."""
    Image.init()
    return FORMATS.get(file.suffix.lower()) in Image.OPEN


def decode(data: bytes, where: str) -> Image.Image:
    """The first frame of an image file as upright RGB; see ``to_rgb`` for what becomes of other modes.

    Raises:
        UserError: truncated, damaged, too large or no image; the message names ``where``.
    """
    try:
        with _opened(data) as image:
            image.load()
            turn = _TURNS.get(_orientation(image, data))
            return to_rgb(image if turn is None else image.transpose(turn))
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, ...
        raise _broken(where, error) from error


def upright_size(data: bytes, where: str) -> tuple[int, int]:
    """Width and height that ``decode`` will give, from the header alone (TIFF: decoded).

    Raises:
        UserError: no image, or one that is too large; the message names ``where``.
    """
    try:
        with _opened(data) as image:
            if image.format == "TIFF":  # whether its size is already turned depends on Pillow's version
                return decode(data, where).size
            width, height = image.size
            return (height, width) if _orientation(image, data) >= 5 else (width, height)
    except UserError:
        raise
    except Exception as error:
        raise _broken(where, error) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: transparency on white, deep grey scaled (not clipped), anything else as Pillow converts it."""
    if image.mode.startswith(("I", "F")):
        image = _eight_bit(image)
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Modes I;16, I and F as L. The range is that of the type: 16 bit, more if values need it, 0 to 1 for floats."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it has pixels that are not finite numbers")
    ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0, 2.0**31 - 1)
    top = next((top for top in ranges if values.max() <= top), ranges[-1])
    return Image.fromarray(np.clip(np.rint(values * (255 / top)), 0, 255).astype(np.uint8))


def _opened(data: bytes) -> Image.Image:
    """Only the formats above: Pillow's others include some that start external programs (EPS)."""
    Image.init()
    formats = [name for name in {*FORMATS.values(), "MPO", "PPM"} if name in Image.OPEN]
    return Image.open(BytesIO(data), formats=formats)


def _orientation(image: Image.Image, data: bytes) -> int:
    """EXIF orientation, 1 to 8; 1 if there is none or the EXIF block is damaged."""
    if image.format == "PNG" and b"eXIf" not in data:
        return 1  # Pillow would decode the whole PNG to look for one
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged EXIF block does not make the picture unusable
        return 1


def _broken(where: str, error: Exception) -> UserError:
    if isinstance(error, Image.DecompressionBombError):
        return UserError(f"the image {where} has too many pixels: shrink it, the training resolution is far below")
    reason = "its content is no known image format" if isinstance(error, Image.UnidentifiedImageError) else error
    return UserError(f"cannot read the image {where}: {reason}. Repair it, save it anew or take it out")
