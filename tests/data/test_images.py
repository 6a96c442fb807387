"""Every kind of image file becomes the same upright RGB picture."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import ExifTags, Image, features

from dreamlora import pictures
from dreamlora.data import colour
from dreamlora.data.folder import load_folder
from dreamlora.data.images import FORMATS, ImageRecord, decode, holds_images, readable, upright_size
from dreamlora.errors import UserError

WIDTH, HEIGHT = 48, 32
Image.init()  # so that all formats are known while tests are collected


@pytest.fixture
def picture() -> Image.Image:
    """Red left half, blue right half, a green band on top: no symmetry."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:, : WIDTH // 2] = (200, 0, 0)
    pixels[:, WIDTH // 2 :] = (0, 0, 200)
    pixels[:8] = (0, 200, 0)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def distance(a: Image.Image, b: Image.Image) -> float:
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean())


LOSSLESS = ["PNG", "BMP", "TIFF", "GIF", "PPM", "QOI"]
LOSSY = [
    "JPEG",
    "WEBP",
    *(["AVIF"] if features.check("avif") else []),
    *(["JPEG2000"] if features.check("jpg_2000") else []),
]


@pytest.mark.parametrize("kind", LOSSLESS + LOSSY)
def test_formats(picture, kind):
    image = decode(encoded(picture, kind), "x")
    assert image.mode == "RGB" and image.size == (WIDTH, HEIGHT)
    assert distance(image, picture) <= (0 if kind in LOSSLESS else 6)


@pytest.mark.parametrize("suffix", [suffix for suffix, kind in FORMATS.items() if kind in (*LOSSLESS, *LOSSY)])
def test_every_suffix_of_a_format_is_read(picture, suffix, tmp_path):
    """Among them those that browsers, phones and old scanners give to JPEG and JPEG 2000."""
    (tmp_path / f"photo{suffix.upper()}").write_bytes(encoded(picture, FORMATS[suffix]))
    (record,) = load_folder(tmp_path, "p").records
    assert distance(record.open(), picture) < 6


@pytest.mark.parametrize("suffix", [suffix for suffix in FORMATS if not readable(Path(f"x{suffix}"))])
def test_photos_that_cannot_be_read_stop_the_run(picture, suffix, tmp_path):
    picture.save(tmp_path / "a.png")
    (tmp_path / f"b{suffix}").write_bytes(b"whatever")
    with pytest.raises(UserError, match=rf"cannot read b\{suffix} .*convert"):
        load_folder(tmp_path, "p")


@pytest.mark.parametrize("suffix", [".jxl", ".dng", ".cr2", ".nef", ".arw", ".psd", ".tga", ".svg", ".ico", ".jxr"])
def test_what_is_known_as_a_photo_without_being_read(suffix):
    assert suffix in FORMATS and FORMATS[suffix] not in Image.OPEN


@pytest.fixture
def afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What Pillow can read is asked anew, and as it was afterwards."""
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    Image.OPEN.pop("HEIF", None)
    pictures.formats.cache_clear()
    yield
    pictures.formats.cache_clear()


def test_heic_is_read_where_the_plug_in_is_installed(
    picture: Image.Image, afresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Photos of iPhones; here the plug-in is a fake one, for files that are PNGs with another beginning."""

    def register() -> None:
        Image.register_open("HEIF", lambda file, name: Image.open(io.BytesIO(file.read()[4:])), _is_heic)

    (tmp_path / "IMG_1.HEIC").write_bytes(b"HEIC" + encoded(picture, "PNG"))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(UserError, match=r'cannot read IMG_1.HEIC \(1 such file\): pip install "dreamlora\[heif\]" for'):
        load_folder(tmp_path, "p")
    pictures.formats.cache_clear()
    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register))
    assert distance(load_folder(tmp_path, "p").records[0].open(), picture) == 0


def _is_heic(begin: bytes) -> bool:
    return begin.startswith(b"HEIC")


@pytest.mark.parametrize("turned", [1, 3, 6, 8])
def test_heic_as_the_plug_in_reads_it(picture: Image.Image, afresh: None, turned: int) -> None:
    """It turns photos itself, and must not have them turned twice."""
    pytest.importorskip("pillow_heif")
    assert readable(Path("a.heic"))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turned
    data = encoded(picture, "HEIF", quality=-1, exif=exif.tobytes(), icc_profile=colour.adobe_rgb())
    expected = decode(encoded(picture, "PNG", exif=exif, icc_profile=colour.adobe_rgb()), "x")
    assert upright_size(data, "x") == expected.size and distance(decode(data, "x"), expected) < 3


def test_folders_that_hold_images(picture, tmp_path):
    assert not holds_images(tmp_path / "gone", "--flag") and not holds_images(tmp_path, "--flag")
    (tmp_path / "folder.png").mkdir()
    picture.save(tmp_path / "folder.png" / "a.png")
    picture.save(tmp_path / ".hidden.png")
    assert not holds_images(tmp_path, "--flag") and holds_images(tmp_path / "folder.png", "--flag")
    with pytest.raises(UserError, match=r"--flag .*a\.png is a file"):
        holds_images(tmp_path / "folder.png" / "a.png", "--flag")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", *(["AVIF"] if features.check("avif") else [])])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(picture, kind, orientation):
    """The stored picture is the upright one turned the other way; decoding turns it back, once."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = picture.transpose(undo[orientation]) if orientation > 1 else picture
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, kind, exif=exif)
    image = decode(data, "x")
    assert image.size == (WIDTH, HEIGHT) == upright_size(data, "x")
    assert distance(image, picture) < 6


def test_damaged_exif_is_ignored(picture):
    data = encoded(picture, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert decode(data, "x").size == upright_size(data, "x") == (WIDTH, HEIGHT)


def test_transparency_becomes_white(picture):
    rgba = picture.convert("RGBA")
    alpha = Image.new("L", rgba.size, 255)
    alpha.paste(0, (0, 0, 10, HEIGHT))
    alpha.paste(128, (10, 8, 20, HEIGHT))
    rgba.putalpha(alpha)
    for kind in ("PNG", "TIFF"):
        image = decode(encoded(rgba, kind), "x")
        assert image.getpixel((5, 20)) == (255, 255, 255)
        assert image.getpixel((15, 20)) == pytest.approx((227, 127, 127), abs=1)
        assert image.getpixel((30, 20)) == (0, 0, 200)


def test_grey_with_alpha():
    image = Image.new("LA", (4, 4), (40, 0))
    image.putpixel((0, 0), (40, 255))
    decoded = decode(encoded(image, "PNG"), "x")
    assert decoded.getpixel((0, 0)) == (40, 40, 40) and decoded.getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette_with_transparency(kind):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([10, 20, 30, 200, 100, 50] + [0] * 750)
    image.putpixel((0, 0), 0)
    decoded = decode(encoded(image, kind, transparency=0), "x")
    assert decoded.getpixel((0, 0)) == (255, 255, 255) and decoded.getpixel((3, 3)) == (200, 100, 50)


def test_transparent_colour_of_rgb_png():
    image = Image.new("RGB", (4, 4), (1, 2, 3))
    image.putpixel((0, 0), (9, 9, 9))
    decoded = decode(encoded(image, "PNG", transparency=(1, 2, 3)), "x")
    assert decoded.getpixel((0, 0)) == (9, 9, 9) and decoded.getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey(picture, mode):
    grey = picture.convert(mode)
    assert distance(decode(encoded(grey, "PNG"), "x"), grey.convert("RGB")) == 0


def test_cmyk():
    decoded = decode(encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=95), "x")
    assert decoded.getpixel((8, 8)) == pytest.approx((0, 255, 255), abs=4)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_is_scaled_not_clipped(kind):
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    decoded = np.asarray(decode(encoded(Image.fromarray(values), kind), "x"))
    assert np.array_equal(decoded[..., 0].ravel(), np.arange(256))
    assert (decoded[..., 0] == decoded[..., 2]).all()


def test_float_tiff():
    values = np.linspace(0, 1, 256).astype(np.float32).reshape(16, 16)
    decoded = np.asarray(decode(encoded(Image.fromarray(values), "TIFF"), "x"))
    assert np.array_equal(decoded[..., 1].ravel(), np.arange(256))
    values[0, 0] = np.nan
    with pytest.raises(UserError, match="not finite"):
        decode(encoded(Image.fromarray(values), "TIFF"), "x")


def test_first_frame_of_an_animation(picture):
    frames = [Image.new("RGB", picture.size, "black")]
    data = encoded(picture, "GIF", save_all=True, append_images=frames)
    assert distance(decode(data, "x"), picture) == 0


def test_photo_with_a_second_picture(picture):
    """Phones write such JPEG files (MPO)."""
    data = encoded(picture, "MPO", save_all=True, append_images=[Image.new("RGB", picture.size)])
    assert distance(decode(data, "x"), picture) < 6


def test_large_photo():
    data = encoded(Image.linear_gradient("L").resize((4000, 3000)).convert("RGB"), "JPEG")
    assert upright_size(data, "x") == decode(data, "x").size == (4000, 3000)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_truncated_file_is_named(kind):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    data = encoded(noise, kind)
    with pytest.raises(UserError, match=r"photos/a\.xyz.*take it out"):
        decode(data[: len(data) // 2], "photos/a.xyz")


@pytest.mark.parametrize("data", [b"", b"hello", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"])
def test_no_image(data):
    with pytest.raises(UserError, match="no known image format"):
        decode(data, "x")
    with pytest.raises(UserError, match="no known image format"):
        upright_size(data, "x")


def test_too_many_pixels(monkeypatch, picture):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(UserError, match="too many pixels"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        decode(encoded(picture, "PNG"), "x")


def test_record_in_memory(picture):
    record = ImageRecord.from_image("a", "a picture", picture)
    again = ImageRecord.from_image("b", "another caption", picture.convert("RGBA"))
    assert distance(record.open(), picture) == 0
    assert record.content_hash() == again.content_hash()
    picture.putpixel((0, 0), (1, 2, 3))
    assert ImageRecord.from_image("a", "a picture", picture).content_hash() != record.content_hash()


def test_unreadable_file(tmp_path: Path):
    file = tmp_path / "gone.png"
    with pytest.raises(UserError, match=r"gone\.png: No such file"):
        ImageRecord("gone.png", "c", file.read_bytes, str(file)).open()
