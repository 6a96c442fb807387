"""One image: how any file becomes upright 8-bit RGB, and the record that training knows it by."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

from dreamlora.data import colour
from dreamlora.errors import UserError

_READ = {
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
_NEVER_READ = (
    ".arw .cr2 .cr3 .crw .dcr .dng .erf .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .raw .rw2 .rwl .sr2 .srf "
    ".srw .x3f .3fr .fff .jxr .wdp .hdp .bpg .flif .exr .hdr .psd .psb .xcf .kra .ora .ai .eps .svg .svgz .wmf .emf "
    ".tga .pcx .dds .sgi .ico .icns"
)
"""Photos and pictures that need a program of their own, or a decoder that takes any file for one of its kind."""
FORMATS: dict[str, str | None] = {
    **{suffix: name for name, suffixes in _READ.items() for suffix in suffixes.split()},
    **dict.fromkeys(_NEVER_READ.split()),
}
"""Suffixes of images, and Pillow's name of the format: None for one that is not read here."""

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
        profile_unused: its colour profile cannot be used (see ``colour``): its colours are taken for sRGB. Known once
            it was decoded.
    """

    content_hash: str
    size: tuple[int, int]
    profile_unused: bool = False


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
            BrokenImage: it cannot be read.
        """
        try:
            return self.read()
        except OSError as error:
            raise BrokenImage(self.where, error.strerror or str(error)) from error

    def open(self) -> Image.Image:
        """The upright RGB image.

        Raises:
            BrokenImage: it cannot be read, or is broken.
        """
        return decode(self.load(), self.where)

    @cached_property
    def facts(self) -> ImageFacts:
        """Hash and size. Reads the file once, if they are not known; what was read then stays the answer.

        Raises:
            BrokenImage: it cannot be read, or is no image.
        """
        if self.known is not None:
            return self.known
        data = self.load()
        return ImageFacts(hashlib.sha256(data).hexdigest(), upright_size(data, self.where))

    def decoded_facts(self) -> ImageFacts:
        """The facts of the file as it is now, decoded whole.

        Raises:
            BrokenImage: it cannot be read, or is broken.
        """
        data = self.load()
        image, profile_unused = _decoded(data, self.where)
        return ImageFacts(hashlib.sha256(data).hexdigest(), image.size, profile_unused)

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
    return FORMATS.get(file.suffix.lower()) in _formats()


def holds_images(folder: Path, flag: str) -> bool:
    """Whether files with names of images lie in the folder itself; False if there is no such folder.

    Args:
        folder: to look into.
        flag: that names it, for error messages.

    Raises:
        UserError: it is a file, or cannot be read.
    """
    try:
        files = list(folder.iterdir()) if folder.exists() else []
    except NotADirectoryError:
        raise UserError(f"{flag} {folder} is a file: give a folder") from None
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be read: {error.strerror}") from error
    return any(file.suffix.lower() in FORMATS and not file.name.startswith(".") and file.is_file() for file in files)


def decode(data: bytes, where: str) -> Image.Image:
    """The first frame of an image file as upright RGB; see ``to_rgb`` for what becomes of other modes and colours.

    Raises:
        BrokenImage: truncated, damaged, too large or no image; the message names ``where``.
    """
    return _decoded(data, where)[0]


def see_through(data: bytes, where: str) -> bool:
    """Whether an image file has pixels that are not opaque.

    Raises:
        BrokenImage: see ``decode``.
    """
    try:
        with _opened(data) as image:
            if not image.has_transparency_data or image.mode.startswith(("I", "F")):
                return False
            straight = image.convert("LA") if image.mode == "La" else image
            return straight.convert("RGBA").getchannel("A").getextrema() != (255, 255)
    except Exception as error:
        raise _broken(where, error) from error


def upright_size(data: bytes, where: str) -> tuple[int, int]:
    """Width and height that ``decode`` will give, from the header alone (TIFF: decoded).

    Raises:
        BrokenImage: no image, or one that is too large; the message names ``where``.
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
    """8-bit sRGB: transparency on white, deep grey scaled (not clipped), colours converted by an embedded profile.

    Colours without a profile, or with one that cannot be used, are taken for sRGB (CMYK: as Pillow converts it).
    """
    return _rgb(image)[0]


def _decoded(data: bytes, where: str) -> tuple[Image.Image, bool]:
    """The image as ``decode`` gives it, and whether it has a profile that cannot be used."""
    try:
        with _opened(data) as image:
            image.load()
            if colour.says_adobe_rgb(image):
                image.info["icc_profile"] = colour.adobe_rgb()
            turn = _TURNS.get(_orientation(image, data))
            return _rgb(image if turn is None else image.transpose(turn))
    except Exception as error:  # decoders raise anything: OSError, SyntaxError, struct.error, ...
        raise _broken(where, error) from error


def _rgb(image: Image.Image) -> tuple[Image.Image, bool]:
    """The image as ``to_rgb`` gives it, and whether it has a profile that cannot be used."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith(("I", "F")):
        image = _eight_bit(image)
    if image.mode == "La":
        image = image.convert("LA")
    grey, alpha = image.mode in ("1", "L", "LA"), None
    if image.has_transparency_data:
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.getchannel("R") if grey else image.convert("RGB")
    profile_unused = False
    try:
        image = colour.to_srgb(image, profile)
    except colour.UnusableProfile:
        image, profile_unused = colour.to_srgb(image, None), True
    image = image.convert("RGB")
    if alpha:
        image.putalpha(alpha)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image.info.pop("icc_profile", None)  # it is no longer true
    return image, profile_unused


def _eight_bit(image: Image.Image) -> Image.Image:
    """Modes I;16, I and F as L. The range is that of the type: 16 bit, more if values need it, 0 to 1 for floats."""
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("it has pixels that are not finite numbers")
    ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0, 2.0**31 - 1)
    top = next((top for top in ranges if values.max() <= top), ranges[-1])
    return Image.fromarray(np.clip(np.rint(values * (255 / top)), 0, 255).astype(np.uint8))


def _opened(data: bytes) -> Image.Image:
    return Image.open(BytesIO(data), formats=_formats())


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those above that can be read. Not all of Pillow's: these include some that start external programs (EPS)."""
    Image.init()
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        pass
    else:
        register_heif_opener()
    return tuple(name for name in _READ if name in Image.OPEN)


def _orientation(image: Image.Image, data: bytes) -> int:
    """EXIF orientation, 1 to 8; 1 if there is none or the EXIF block is damaged."""
    if image.format == "PNG" and b"eXIf" not in data:
        return 1  # Pillow would decode the whole PNG to look for one
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged EXIF block does not make the picture unusable
        return 1


def _broken(where: str, error: Exception) -> BrokenImage:
    if isinstance(error, Image.DecompressionBombError):
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6  # Pillow warns above the limit and refuses above its double
        return BrokenImage(
            where, f"it has too many pixels (more than {most:.0f} million), far above any resolution here"
        )
    if isinstance(error, Image.UnidentifiedImageError):
        return BrokenImage(where, "its content is no known image format")
    return BrokenImage(where, str(error) or type(error).__name__)
