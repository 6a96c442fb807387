"""Colours as a file means them: what its ICC profile says becomes sRGB, which is what models are trained on.

LittleCMS converts (through Pillow), relatively colorimetrically and with black point compensation: colours that sRGB
has stay what they are, those it lacks are clipped, and the darkest black becomes black. The perceptual intent would
move all colours, by rules of each profile's maker; profiles of cameras and screens have no such rules anyway.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from io import BytesIO

import numpy as np
from PIL import ExifTags, Image, ImageCms

from dreamlora.pictures import exif_of

MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab": "LAB"}
"""Pillow's mode of the colours that a profile is about."""
SAME = 1
"""A profile that moves no colour by more than one level of 255 is sRGB by another name."""
KEPT = 16
"""Different profiles whose conversion stays in memory."""
MOST_BYTES = 2**23
"""Of a profile; those of presses with their large tables have three million."""

_PROBE = np.stack(np.meshgrid(*[np.linspace(0, 255, 18)] * 3), -1).round().astype(np.uint8).reshape(18, -1, 3)


class UnusableProfile(ValueError):
    """A profile that is damaged, or about other colours than its image has."""


def to_srgb(profile: bytes | None, mode: str) -> Callable[[Image.Image], Image.Image] | None:
    """What makes sRGB of an image's pixels; None where nothing would change.

    Args:
        profile: of its colours; None: they are sRGB, or those of its mode as Pillow takes them.
        mode: of the image, without transparency, 8 bit per channel.

    Raises:
        UnusableProfile: see there.
    """
    if profile is None and mode != "LAB":
        return None
    wanted, conversion = _conversion(profile, _plain_mode(mode))
    if conversion is None:
        return None
    apply = conversion.apply
    return lambda image: apply(image if image.mode == wanted else image.convert(wanted))


def says_adobe_rgb(image: Image.Image) -> bool:
    """Cameras that are set to Adobe RGB write no profile but this (DCF's optional colour space, Exif 2.3, 4.6.5)."""
    if image.mode != "RGB" or "icc_profile" in image.info:
        return False
    try:
        return exif_of(image).get_ifd(ExifTags.IFD.Interop).get(ExifTags.Interop.InteropIndex) == "R03"
    except Exception:  # a damaged EXIF block does not make the picture unusable
        return False


@functools.cache
def adobe_rgb() -> bytes:
    """Adobe RGB (1998) as a profile: gamma 563/256, and its red, green and blue as XYZ under D50."""
    curve = struct.pack(">4sIIHxx", b"curv", 0, 1, 563)
    tags = {
        b"rXYZ": _xyz(0.60974, 0.31111, 0.01947),
        b"gXYZ": _xyz(0.20528, 0.62567, 0.06087),
        b"bXYZ": _xyz(0.14919, 0.06322, 0.74457),
        b"wtpt": _xyz(0.95045, 1.0, 1.08905),
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
    }
    table, content, start = b"", b"", 132 + 12 * len(tags)
    for name, tag in tags.items():
        table += struct.pack(">4sII", name, start + len(content), len(tag))
        content += tag
    kinds = struct.pack(">4xI4s4s4s12x4s28x", 0x02100000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    header = kinds + _xyz(0.9642, 1.0, 0.8249)[8:] + bytes(48)
    return struct.pack(">I", start + len(content)) + header + struct.pack(">I", len(tags)) + table + content


def _plain_mode(mode: str) -> str:
    if mode in ("1", "L"):
        return "L"
    return mode if mode in MODES.values() else "RGB"


@functools.lru_cache(maxsize=KEPT)
def _conversion(profile: bytes | None, mode: str) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    """The mode to convert from and how; None: nothing would change."""
    if profile and len(profile) > MOST_BYTES:
        raise UnusableProfile(f"a profile of more than {MOST_BYTES >> 20} MiB")
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile) if profile else ImageCms.createProfile("LAB"))
        wanted = MODES.get(source.profile.xcolor_space.strip(), "")
        if wanted != mode and (wanted, mode) != ("RGB", "L"):  # programs do put profiles of RGB into grey images
            raise UnusableProfile(f"a profile of {source.profile.xcolor_space.strip()} in an image of {mode}")
        conversion = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            wanted,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (OSError, TypeError, ImageCms.PyCMSError) as error:  # a type error: of a tag that holds no bytes
        raise UnusableProfile(str(error)) from error
    return wanted, None if wanted in ("RGB", "L") and _changes_nothing(conversion, wanted) else conversion


def _changes_nothing(conversion: ImageCms.ImageCmsTransform, mode: str) -> bool:
    before = Image.fromarray(_PROBE).convert(mode)
    after = np.asarray(conversion.apply(before), np.int16)
    return int(np.abs(after - np.asarray(before.convert("RGB"), np.int16)).max()) <= SAME


def _xyz(*values: float) -> bytes:
    return struct.pack(">4sI3i", b"XYZ ", 0, *(round(value * 65536) for value in values))
