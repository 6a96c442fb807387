"""Every picture is opened here: of the formats that are read, from a regular file, within bounds.

Pillow alone would try all the decoders that it has, one of which starts Ghostscript, and would take gigabytes for what
a small file claims. ``picture_headers`` has the bounds of single formats.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

from PIL import ExifTags, Image, TiffImagePlugin

from dreamlora.errors import UserError
from dreamlora.picture_headers import EXIF_BYTES, refuse_bomb
from dreamlora.reading import UnreadableError, read_bytes

READ = {
    "JPEG": ".jpg .jpeg .jpe .jfif .jif .jfi .pjpeg .pjp .jpg_large .mpo .jps .insp",
    "PNG": ".png .apng",
    "WEBP": ".webp",
    "BMP": ".bmp .dib",
    "TIFF": ".tif .tiff",
    "GIF": ".gif",
    "AVIF": ".avif .avifs",
    "HEIF": ".heic .heif .heics .heifs .hif",
    "JPEG2000": ".jp2 .j2k .j2c .jpc .jpx .jpf .jpeg2000",
    "JXL": ".jxl",
    "PPM": ".ppm .pgm .pbm .pnm .pfm",
    "QOI": ".qoi",
}
"""Suffixes by Pillow's name of the format. Pillow reads AVIF from 11.3 on, HEIF with pillow-heif, JPEG XL not."""
OWN = ("PNG", "WEBP")
"""The formats of a run's own pictures."""

MEMORY = 2**30
"""Bytes that a picture may take while it is decoded, with its file: 130 million pixels of a JPEG that is not
progressive."""
OWN_MEMORY = 2**28
TOGETHER = 2**31
"""What all that are decoded at the same time may take."""
LONGEST = 2**16
"""Of a side in pixels, and not reached."""
SLOW_PIXELS = 2**24
"""Of a format whose decoder is written in Python: a microsecond each."""
FILM_PIXELS = 2**28
"""Of all frames of an animation together."""
_READS = 2**20
_PIXEL_BYTES = {"JPEG": 10, "MPO": 10, "TIFF": 12, "WEBP": 16, "AVIF": 16, "HEIF": 16, "JPEG2000": 24}
"""Per pixel while it is decoded, at most: the coefficients of progressive JPEG, a TIFF in a single strip of 16 bits,
WebP's canvases, JPEG 2000's whole numbers. Of others, 5."""
_ROWS_PER_STRIP = 278
_CONVERTED = 8
"""Per pixel: the picture and another one that is made of it."""

warnings.filterwarnings("ignore", module=r"PIL\.")  # of large pictures: there are bounds here; of odd tags


class BrokenImage(UserError):
    """An image that cannot be read.

    Args:
        where: full path, or data set and row.
        reason: what is wrong with it.
    """

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(where, reason)
        self.where = where
        self.reason = reason

    def __str__(self) -> str:
        return f"cannot read the image {self.where}: {self.reason}. Repair it, save it anew or take it out"


class Content(BytesIO):
    """A picture's file in memory, which ends the loops of Pillow's parsers: each step of them reads.

    Args:
        data: the file's bytes. ``close`` lets go of them.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._left = _READS

    def read(self, size: int | None = -1, /) -> bytes:
        """As of any file.

        Raises:
            ValueError: too many parts were read.
        """
        self._left -= 1
        if self._left < 0:
            raise ValueError(f"it has more than {_READS} parts")
        return super().read(size)

    def trust(self) -> None:
        """No longer count."""
        self.read = super().read  # type: ignore[method-assign]


class _Room:
    """Memory that threads share. One that asks for more than there is waits, until it is alone at the latest."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._used = 0
        self._changed = threading.Condition()

    @contextmanager
    def of(self, size: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + size <= self._size)
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()


_room = _Room(TOGETHER)


@functools.cache
def formats() -> tuple[str, ...]:
    """Those that can be read here. Not all of Pillow's: these include some that start external programs (EPS)."""
    Image.init()
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        pass
    else:
        register_heif_opener()
    return tuple(name for name in READ if name in Image.OPEN)


@contextmanager
def opened(
    content: Content, where: str, kinds: tuple[str, ...] | None = None, memory: int = MEMORY
) -> Iterator[Image.Image]:
    """A picture, not decoded yet. Whatever goes wrong with it in the block is a ``BrokenImage``.

    Blocks must not lie in each other: each waits for memory.

    Args:
        content: the file.
        where: full path, or data set and row, for error messages.
        kinds: Pillow's names of the formats that it may have; None: all that are read.
        memory: bytes that it may take.

    Raises:
        BrokenImage: it is no picture of these formats, damaged, or beyond the bounds.
    """
    try:
        refuse_bomb(content.getvalue())
        with Image.open(content, formats=kinds or formats()) as image, _room.of(_needed(image, content, memory)):
            yield image
    except UserError:
        raise
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, ...
        raise BrokenImage(where, _reason(error)) from error


def own_picture(file: Path, inside: Path | None = None) -> Image.Image:
    """A picture of a run, in RGB.

    Args:
        file: PNG or WebP.
        inside: the folder that it must lie in once all links are followed; None: anywhere.

    Raises:
        FileNotFoundError: there is no such file.
        BrokenImage: it is no such picture, no regular file, too large, or lies elsewhere.
    """
    with opened(Content(_file(file, OWN_MEMORY, inside)), str(file), OWN, OWN_MEMORY) as image:
        return image.convert("RGB")


def own_film(file: Path, most: int, inside: Path | None = None) -> tuple[bytes, Image.Image]:
    """The bytes of an animated WebP, every frame of which was decoded, and the last frame in RGB.

    Args:
        file: of the animation.
        most: bytes that it may have.
        inside: see ``own_picture``.

    Raises:
        FileNotFoundError, BrokenImage: see ``own_picture``.
    """
    data = _file(file, most, inside)
    with opened(Content(data), str(file), ("WEBP",), OWN_MEMORY) as image:
        frames = getattr(image, "n_frames", 1)
        if frames * image.width * image.height > FILM_PIXELS:
            raise ValueError(f"its {frames} frames have more than {FILM_PIXELS >> 20} million pixels together")
        image.seek(frames - 1)
        return data, image.convert("RGB")


def orientation(image: Image.Image, content: Content) -> int:
    """EXIF orientation, 1 to 8; 1 if there is none or the EXIF block is damaged."""
    if image.format == "PNG" and b"eXIf" not in content.getvalue():
        return 1  # Pillow would decode the whole PNG to look for one
    try:
        return int(exif_of(image).get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged EXIF block does not make the picture unusable
        return 1


def exif_of(image: Image.Image) -> Image.Exif:
    """A picture's EXIF.

    Raises:
        ValueError: it is far larger than any.
    """
    if len(image.info.get("exif") or b"") > EXIF_BYTES:
        raise ValueError(f"it has more than {EXIF_BYTES >> 10} KiB of EXIF")
    return image.getexif()


def _file(file: Path, most: int, inside: Path | None) -> bytes:
    try:
        return read_bytes(file, most, inside)
    except UnreadableError as error:
        raise BrokenImage(str(file), error.reason) from error


def _needed(image: Image.Image, content: Content, memory: int) -> int:
    """Bytes that decoding will take; raises ValueError for what is beyond the bounds."""
    pixels, coders = image.width * image.height, {tile[0] for tile in getattr(image, "tile", ())}
    if max(image.size) >= LONGEST:
        raise ValueError(f"it is {image.width} x {image.height} pixels, and a side may have {LONGEST - 1} at most")
    if coders & Image.DECODERS.keys():
        if pixels > SLOW_PIXELS:
            raise ValueError(f"it has {_millions(pixels)} pixels, and decoding so many takes minutes in this format")
        content.trust()
    each = 4 if _in_strips(image) else _PIXEL_BYTES.get(image.format or "", 5)
    needed = max(len(content.getvalue()) + pixels * each, pixels * _CONVERTED)
    if needed > memory:
        raise ValueError(
            f"it has too many pixels ({_millions(pixels)}): decoding it would take {needed / 2**20:.0f} MiB of memory, "
            f"and one image may take {memory >> 20} here. Make it smaller"
        )
    return needed


def _in_strips(image: Image.Image) -> bool:
    """Whether it is a TIFF that is not packed, or in parts that are small beside the whole."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return False
    rows = image.tag_v2.get(_ROWS_PER_STRIP, image.height)
    return image.tile[0][0] == "raw" or rows * 16 <= image.height


def _millions(pixels: int) -> str:
    return f"{pixels / 1e6:.0f} million"


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # Pillow warns above the limit and refuses above its double
        return f"it has too many pixels (more than {_millions(most)}), far above any resolution here"
    if isinstance(error, Image.UnidentifiedImageError):
        return "its content is no known image format"
    if isinstance(error, MemoryError):
        return "there is not enough memory to decode it"
    return str(error)[:200] or type(error).__name__
