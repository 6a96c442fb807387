"""One image: how any file becomes upright 8-bit RGB, and the record that training knows it by."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from dreamlora.data import colour, rgb
from dreamlora.data.rgb import Opacity, to_rgb
from dreamlora.errors import UserError
from dreamlora.pictures import READ, BrokenImage, Content, formats, opened, orientation
from dreamlora.reading import UnreadableError, read_bytes

_NEVER_READ = (
    ".arw .cr2 .cr3 .crw .dcr .dng .erf .iiq .kdc .mef .mos .mrw .nef .nrw .orf .pef .raf .raw .rw2 .rwl .sr2 .srf "
    ".srw .x3f .3fr .fff .jxr .wdp .hdp .bpg .flif .exr .hdr .psd .psb .xcf .kra .ora .ai .eps .svg .svgz .wmf .emf "
    ".tga .pcx .dds .sgi .ico .icns"
)
"""Photos and pictures that need a program of their own, or a decoder that takes any file for one of its kind."""
FORMATS: dict[str, str | None] = {
    **{suffix: name for name, suffixes in READ.items() for suffix in suffixes.split()},
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


IMAGE_BYTES = 2**29
"""Of an image file."""


class ImageFacts(NamedTuple):
    """What is known of an image without decoding it.

    Attributes:
        content_hash: SHA-256 of the file's bytes, in hexadecimal.
        size: width and height in pixels, upright.
        profile_unused: its colour profile cannot be used (see ``colour``): its colours are taken for sRGB. Known once
            it was decoded.
        opacity: known once it was decoded.
    """

    content_hash: str
    size: tuple[int, int]
    profile_unused: bool = False
    opacity: Opacity = Opacity.ALL


class Decoded(NamedTuple):
    """An image, and the facts of the file that it is from."""

    image: Image.Image
    facts: ImageFacts


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
        conditioning: what a model that edits is shown: the image before the edit.
        of_alpha: whether it stands for the alpha channel of its file, as the mask of that image.
    """

    name: str
    caption: str
    read: Callable[[], bytes]
    where: str
    known: ImageFacts | None = None
    dataset: int = 0
    mask: ImageRecord | None = None
    conditioning: ImageRecord | None = None
    other_captions: tuple[str, ...] = ()
    of_alpha: bool = False

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
        except UnreadableError as error:
            raise BrokenImage(self.where, error.reason) from error
        except OSError as error:
            raise BrokenImage(self.where, error.strerror or str(error)) from error

    def decoded(self) -> Decoded:
        """The upright RGB image, and the facts of its file as it is now.

        Raises:
            BrokenImage: it cannot be read, or is broken.
        """
        data = self.load()
        digest, content = hashlib.sha256(data).hexdigest(), Content(data)
        del data  # else it would lie in memory beside the decoded image
        image, profile_unused, opacity = _decoded(content, self.where)
        return Decoded(image, ImageFacts(digest, image.size, profile_unused, opacity))

    def open(self) -> Image.Image:
        """The upright RGB image.

        Raises:
            BrokenImage: it cannot be read, or is broken.
        """
        return self.decoded().image

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
        return self.decoded().facts

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
    return FORMATS.get(file.suffix.lower()) in formats()


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


def file_reader(file: Path) -> Callable[[], bytes]:
    """Gives the bytes of a regular file that can be an image; can be pickled."""
    return functools.partial(read_bytes, file, IMAGE_BYTES)


def open_image(file: Path, where: str) -> Image.Image:
    """The image of a file that is no record of a data set.

    Raises:
        BrokenImage: it cannot be read, or is no image; the message names ``where``.
    """
    return ImageRecord(file.name, file.name, file_reader(file), where).open()


def decode(data: bytes, where: str) -> Image.Image:
    """The first frame of an image file as upright RGB; see ``rgb.to_rgb`` for what becomes of other modes and colours.

    Raises:
        BrokenImage: truncated, damaged, too large or no image; the message names ``where``.
    """
    return _decoded(Content(data), where)[0]


def see_through(data: bytes, where: str) -> bool:
    """Whether an image file has pixels that are not opaque.

    Raises:
        BrokenImage: see ``decode``.
    """
    with opened(Content(data), where) as image:
        return any(piece.getextrema() != (255, 255) for _, piece in rgb.alpha_pieces(image))


def alpha(data: bytes, where: str) -> Image.Image:
    """The upright alpha channel of an image file; white for one that has none.

    Raises:
        BrokenImage: see ``decode``.
    """
    content = Content(data)
    with opened(content, where) as image:
        image.load()
        turn = _TURNS.get(orientation(image, content))
        content.close()
        channel = Image.new("L", image.size, 255)
        for box, piece in rgb.alpha_pieces(image):
            channel.paste(piece, box)
    return channel if turn is None else channel.transpose(turn)


def upright_size(data: bytes, where: str) -> tuple[int, int]:
    """Width and height that ``decode`` will give, from the header alone (TIFF: decoded).

    Raises:
        BrokenImage: no image, or one that is too large; the message names ``where``.
    """
    content = Content(data)
    with opened(content, where) as image:
        if image.format != "TIFF":
            width, height = image.size
            return (height, width) if orientation(image, content) >= 5 else (width, height)
    return decode(data, where).size  # whether a TIFF's size is already turned depends on Pillow's version


def _decoded(content: Content, where: str) -> rgb.Converted:
    """The image as ``decode`` gives it, and what else is known of it then; closes ``content``."""
    with opened(content, where) as image:
        image.load()
        if colour.says_adobe_rgb(image):
            image.info["icc_profile"] = colour.adobe_rgb()
        turn = _TURNS.get(orientation(image, content))
        content.close()
        converted = rgb.converted(image)
        image.close()
        return converted if turn is None else converted._replace(image=converted.image.transpose(turn))
