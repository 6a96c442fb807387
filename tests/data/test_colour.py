"""Colour profiles against their definitions: matrix, curve and white, computed here without LittleCMS."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, features

from dreamlora.data.images import ImageRecord, decode
from dreamlora.data.rgb import to_rgb

Curve = Callable[[np.ndarray], np.ndarray]
Xy = tuple[float, float]

D65, D50_XYZ = (0.3127, 0.3290), np.array([0.9642, 1.0, 0.8249])
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
PRIMARIES: dict[str, tuple[Xy, Xy, Xy, Xy]] = {
    "sRGB": ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), D65),
    "Display P3": ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), D65),
    "Adobe RGB": ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06), D65),
    "ProPhoto RGB": ((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001), (0.3457, 0.3585)),
}


def linear_from_srgb(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def srgb_from_linear(values: np.ndarray) -> np.ndarray:
    values = values.clip(0, 1)
    return np.where(values <= 0.0031308, values * 12.92, 1.055 * values ** (1 / 2.4) - 0.055)


def gamma(power: float) -> Curve:
    return lambda values: values**power


CURVES: dict[str, Curve] = {
    "sRGB": linear_from_srgb,
    "Display P3": linear_from_srgb,
    "Adobe RGB": gamma(563 / 256),
    "ProPhoto RGB": gamma(1.8),
}


def xyz(point: Xy) -> np.ndarray:
    return np.array([point[0], point[1], 1 - sum(point)]) / point[1]


def matrix(name: str) -> np.ndarray:
    """Linear RGB to XYZ under D50: the columns of a profile."""
    *corners, white = PRIMARIES[name]
    colours = np.stack([xyz(corner) for corner in corners], 1)
    colours = colours * np.linalg.solve(colours, xyz(white))
    scale = np.diag(BRADFORD @ D50_XYZ / (BRADFORD @ xyz(white)))
    return np.linalg.inv(BRADFORD) @ scale @ BRADFORD @ colours


def expected(pixels: np.ndarray, name: str) -> np.ndarray:
    """The sRGB of pixels ``[..., 3]`` in the colours of ``name``."""
    there = CURVES[name](pixels / 255) @ matrix(name).T
    return np.rint(255 * srgb_from_linear(there @ np.linalg.inv(matrix("sRGB")).T))


# --- profiles, as the ICC's specification has them ---


def s15(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(value * 65536) for value in values))


def profile(space: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr", pcs: bytes = b"XYZ ") -> bytes:
    table, content, start = b"", b"", 132 + 12 * len(tags)
    for name, tag in tags.items():
        tag += bytes(-len(tag) % 4)
        table += struct.pack(">4sII", name, start + len(content), len(tag))
        content += tag
    kinds = struct.pack(">4s4s4s4s12x4s", b"\2\x40\0\0", kind, space, pcs, b"acsp")
    body = b"test" + kinds + bytes(28) + s15(*D50_XYZ) + bytes(48) + struct.pack(">I", len(tags)) + table + content
    return struct.pack(">I", 4 + len(body)) + body


def curve_tag(curve: Curve, points: int = 4096) -> bytes:
    values = np.rint(65535 * curve(np.linspace(0, 1, points))).astype(">u2")
    return struct.pack(">4sII", b"curv", 0, len(values)) + values.tobytes()


HP_SRGB = np.array([[0.43607, 0.22249, 0.01392], [0.38515, 0.71687, 0.09708], [0.14307, 0.06061, 0.7141]]).T
"""The columns of "sRGB IEC61966-2.1", which most tagged files have, as they are rounded there."""


def rgb_profile(name: str, columns: np.ndarray | None = None, points: int = 4096) -> bytes:
    colours = matrix(name) if columns is None else columns
    named = zip((b"rXYZ", b"gXYZ", b"bXYZ"), colours.T, strict=True)
    tags = {tag: b"XYZ \0\0\0\0" + s15(*column) for tag, column in named}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve_tag(CURVES[name], points))
    return profile(b"RGB ", {**tags, b"wtpt": b"XYZ \0\0\0\0" + s15(*D50_XYZ)})


def grey_profile(curve: Curve) -> bytes:
    return profile(b"GRAY", {b"kTRC": curve_tag(curve), b"wtpt": b"XYZ \0\0\0\0" + s15(*D50_XYZ)})


INKS = [(c, m, y, k) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]


def lab_of_inks(inks: tuple[int, ...]) -> np.ndarray:
    """A press whose black is no darker than L = 10, as on paper."""
    c, m, y, k = inks
    light = 100 - 90 * (k or (20 * c + 25 * m + 5 * y) / 100)
    return np.array([light, 0 if k else 40 * m - 30 * c, 0 if k else 50 * y - 40 * c])


def cmyk_profile() -> bytes:
    """Tables of corners (lut8), with curves that change nothing; the perceptual one has a dark cyan."""
    ramp = bytes(range(256))
    exact = np.array([lab_of_inks(inks) for inks in INKS])
    perceptual = np.where(np.array(INKS) @ (1, 0, 0, 0) == 1, 30, exact.T).T
    head = struct.pack(">4sIBBBx", b"mft1", 0, 4, 3, 2) + s15(1, 0, 0, 0, 1, 0, 0, 0, 1)
    to_lab = [
        head + ramp * 4 + np.rint(lab * [2.55, 1, 1] + [0, 128, 128]).astype(np.uint8).tobytes() + ramp * 3
        for lab in (perceptual, exact)
    ]
    # back, as far as LittleCMS asks to find the darkest black: all black ink at L = 0, none at 100
    head = struct.pack(">4sIBBBx", b"mft1", 0, 3, 4, 2) + s15(1, 0, 0, 0, 1, 0, 0, 0, 1)
    to_inks = head + ramp * 3 + bytes([0, 0, 0, 255] * 4 + [0, 0, 0, 0] * 4) + ramp * 4
    tags = {b"A2B0": to_lab[0], b"A2B1": to_lab[1], b"B2A0": to_inks, b"wtpt": b"XYZ \0\0\0\0" + s15(*D50_XYZ)}
    return profile(b"CMYK", tags, b"prtr", b"Lab ")


def srgb_of_lab(lab: np.ndarray) -> np.ndarray:
    """sRGB of Lab under D50, ``[..., 3]``."""
    y = (lab[..., 0] + 16) / 116
    f = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], -1)
    there = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * D50_XYZ
    return np.rint(255 * srgb_from_linear(there @ np.linalg.inv(matrix("sRGB")).T))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def cube() -> np.ndarray:
    """Colours all over the cube, uint8 ``[16, 256, 3]``."""
    return np.random.default_rng(0).integers(0, 256, (16, 256, 3), dtype=np.uint8)


def read(data: bytes) -> np.ndarray:
    return np.asarray(decode(data, "x"), np.float64)


# --- what becomes of them ---


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG", *(["AVIF"] if features.check("avif") else [])])
@pytest.mark.parametrize("name", ["Display P3", "Adobe RGB", "ProPhoto RGB"])
def test_rgb_profiles(name: str, kind: str) -> None:
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}, "AVIF": {"quality": 100}}
    data = encoded(Image.fromarray(cube()), kind, icc_profile=rgb_profile(name), **options.get(kind, {}))
    stored = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float64)  # what a lossy format made of it
    difference = np.abs(read(data) - expected(stored, name))
    # ProPhoto's blacks are spread over few levels, where a rounded step is a large one
    assert np.quantile(difference, 0.999) <= (2 if name == "ProPhoto RGB" else 1) and difference.max() <= 6
    assert np.abs(stored - expected(stored, name)).max() > 40, "the profile does make a difference"


@pytest.mark.parametrize("source", ["LittleCMS", "by hand", "rounded", "coarse"])
def test_srgb_by_any_profile_keeps_every_bit(source: str) -> None:
    given = rgb_profile("sRGB", HP_SRGB if source != "by hand" else None, 26 if source == "coarse" else 1024)
    if source == "LittleCMS":
        given = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for mode in ("RGB", "L", "RGBA", "P"):
        image = Image.fromarray(cube()).convert(mode)
        assert np.array_equal(read(encoded(image, icc_profile=given)), read(encoded(image))), mode


@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "1"])
def test_grey_profiles(mode: str) -> None:
    levels = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    image = Image.fromarray(levels)
    if mode == "I;16":
        image = Image.fromarray(levels.astype(np.uint16) * 257)
    elif mode == "LA":
        image.putalpha(255)
    elif mode == "1":
        image = image.convert("1")
    wanted = np.rint(255 * srgb_from_linear((np.asarray(image.convert("L") if mode == "1" else levels) / 255) ** 1.8))
    got = read(encoded(image, icc_profile=grey_profile(gamma(1.8))))
    assert (got[..., 0] == got[..., 2]).all()
    assert np.abs(got[..., 0] - wanted).max() <= (2 if mode != "1" else 0)
    assert mode == "1" or np.abs(wanted - levels).max() > 15


def test_a_profile_of_rgb_in_a_grey_image_is_its_curve() -> None:
    levels = np.tile(np.arange(256, dtype=np.uint8), (4, 1))
    got = read(encoded(Image.fromarray(levels), icc_profile=rgb_profile("ProPhoto RGB")))
    assert np.abs(got - expected(np.stack([levels] * 3, -1), "ProPhoto RGB")).max() <= 2


def test_cmyk_profile_with_paper_black_as_black() -> None:
    inks = np.array([INKS], np.uint8) * 255
    got = read(encoded(Image.frombytes("CMYK", (16, 1), inks.tobytes()), "TIFF", icc_profile=cmyk_profile()))[0]
    lab = np.array([lab_of_inks(each) for each in INKS])
    light, black = srgb_of_lab(lab), [each[3] == 1 for each in INKS]
    assert light[black].min() > 20, "without compensation the black of the press would be a grey"
    assert got[black].max() <= 4
    assert got[0] == pytest.approx([255] * 3, abs=1), "the paper is white"
    # between them everything moves a little towards black; the hues are those of the table
    assert np.abs(got - light)[~np.array(black)].max() <= 30
    bare = read(encoded(Image.frombytes("CMYK", (16, 1), inks.tobytes()), "TIFF"))[0]
    assert np.abs(bare - got).max() > 60


@pytest.mark.parametrize("tagged", [False, True])
def test_lab(tagged: bool) -> None:
    """Without a profile, too: there is but one Lab."""
    values = np.array([[[60, 20, 30], [30, -20, 10], [90, 0, 0], [50, 10, -40]]])
    stored = (values * [2.55, 1, 1]).round()
    options = {"icc_profile": ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()} if tagged else {}
    got = read(
        encoded(Image.frombytes("LAB", (4, 1), stored.astype(np.int16).astype(np.uint8).tobytes()), "TIFF", **options)
    )
    assert np.abs(got - srgb_of_lab(stored / [2.55, 1, 1])).max() <= 3


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA"])
def test_transparency_is_put_on_white_after_the_conversion(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (200, 100, 50, 255))
    image.putpixel((1, 0), (200, 100, 50, 128))
    given, name = rgb_profile("ProPhoto RGB"), "ProPhoto RGB"
    if mode == "LA":
        image, given = image.convert("LA"), grey_profile(gamma(1.8))
    if mode == "P":
        image = image.quantize()
    plain = np.asarray(image.convert("RGBA"), np.float64)[0]
    solid, half = read(encoded(image, icc_profile=given))[0]
    wanted = expected(plain[0, :3], name)  # both have gamma 1.8: a grey is the same in both
    assert solid == pytest.approx(wanted, abs=2)
    assert half == pytest.approx(255 + (wanted - 255) * plain[1, 3] / 255, abs=2)


def test_turned_photo_keeps_its_colours() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = encoded(Image.fromarray(cube()), exif=exif, icc_profile=rgb_profile("Display P3"))
    plain = encoded(Image.fromarray(cube()), icc_profile=rgb_profile("Display P3"))
    assert np.array_equal(read(data), np.rot90(read(plain), -1))


def exif_of_interop(index: bytes) -> bytes:
    """An EXIF block as cameras write it: a directory, in it one for EXIF, in it one for interoperability."""

    def directory(tag: int, kind: int, count: int, value: bytes) -> bytes:
        return struct.pack("<HHHI4sI", 1, tag, kind, count, value, 0)

    first, second, third = (8 + 18 * number for number in range(3))
    head = b"Exif\0\0II*\0" + struct.pack("<I", first)
    pointers = directory(0x8769, 4, 1, struct.pack("<I", second)) + directory(0xA005, 4, 1, struct.pack("<I", third))
    return head + pointers + directory(1, 2, 4, index)


def test_camera_that_says_adobe_rgb_in_exif_alone() -> None:
    exif = exif_of_interop(b"R03\0")
    data = encoded(Image.fromarray(cube()), "JPEG", exif=exif, quality=100)
    stored = np.asarray(Image.open(io.BytesIO(data)), np.float64)
    assert np.quantile(np.abs(read(data) - expected(stored, "Adobe RGB")), 0.999) <= 1
    # a profile in the file says it better
    tagged = encoded(Image.fromarray(cube()), "JPEG", exif=exif, quality=100, icc_profile=rgb_profile("sRGB"))
    assert np.array_equal(read(tagged), stored)


UNUSABLE = {
    "no profile at all": b"not a profile",
    "cut off": rgb_profile("Display P3")[:200],
    "of ink": cmyk_profile(),
    "of grey": grey_profile(gamma(1.8)),
    "without its curves": profile(b"RGB ", {b"wtpt": b"XYZ \0\0\0\0" + s15(*D50_XYZ)}),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_unusable_profiles_count_and_change_nothing(what: str) -> None:
    image = Image.fromarray(cube())
    data = encoded(image, icc_profile=UNUSABLE[what])
    assert np.array_equal(read(data), cube())
    assert ImageRecord("a.png", "c", lambda: data, "a.png").decoded_facts().profile_unused
    sound = encoded(image, icc_profile=rgb_profile("Display P3"))
    assert not ImageRecord("a.png", "c", lambda: sound, "a.png").decoded_facts().profile_unused


def test_lab_with_a_profile_of_rgb() -> None:
    stored = Image.frombytes("LAB", (1, 1), bytes([153, 148, 158]))
    wrong, plain = encoded(stored, "TIFF", icc_profile=rgb_profile("Display P3")), encoded(stored, "TIFF")
    assert np.array_equal(read(wrong), read(plain))


def test_converted_images_carry_no_profile() -> None:
    """Else a second conversion, or a file written of them, would change their colours again."""
    image = decode(encoded(Image.fromarray(cube()), icc_profile=rgb_profile("Display P3")), "x")
    assert "icc_profile" not in image.info
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image))
