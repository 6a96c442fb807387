"""Pictures of strangers: what is opened, and what it may cost."""

from __future__ import annotations

import io
import os
import struct
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from dreamlora import pictures
from dreamlora.data.colour import adobe_rgb
from dreamlora.data.images import FORMATS, alpha, decode, see_through, upright_size
from dreamlora.pictures import READ, BrokenImage, Content, opened, own_film, own_picture
from tests.fuzzing import damaged, fuzzed, harmless
from tests.limits import memory_limit, peak_memory

NAMES = [name for name in READ if name in Image.SAVE or name in ("JPEG2000", "AVIF")]


def encoded(kind: str, mode: str = "RGB", size: tuple[int, int] = (32, 24), **options: Any) -> bytes:
    data = io.BytesIO()
    Image.radial_gradient("L").resize(size).convert(mode).save(data, kind, **options)
    return data.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def blank_png(side: int, depth: int, colour: int, more: bytes = b"") -> bytes:
    """A black square of any size: a thousandth of its pixels' bytes."""
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    packer, row = zlib.compressobj(1), bytes(1 + (side * channels * depth + 7) // 8)
    content = b"".join([*(packer.compress(row) for _ in range(side)), packer.flush()])
    head = struct.pack(">IIBBBBB", side, side, depth, colour, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(768)) if colour == 3 else b""
    parts = chunk(b"IHDR", head) + more + palette + chunk(b"IDAT", content) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


# --- which files ---


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_run_s_own_pictures(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(encoded(kind, "RGBA", lossless=True))
    assert own_picture(file).mode == "RGB" and own_picture(file, tmp_path).size == (32, 24)


@pytest.mark.parametrize("kind", ["JPEG", "GIF", "BMP", "TIFF", "PPM", "EPS", "ICO", "PCX", "TGA", "PDF", "SGI", "IM"])
def test_a_run_has_no_pictures_of_other_formats(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(encoded(kind))
    with pytest.raises(BrokenImage, match="no known image format"):
        own_picture(file)


def test_no_program_is_started_for_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow starts Ghostscript for EPS, whatever the file is called."""
    monkeypatch.setattr("subprocess.Popen", lambda *args, **kwargs: pytest.fail(f"started {args}"))
    content = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n{} loop\n%%EOF\n"
    for name in ("a.png", "a.eps", "a.jpg"):
        (tmp_path / name).write_bytes(content)
        for read in (own_picture, lambda file: decode(file.read_bytes(), "x"), lambda file: own_film(file, 9999)):
            with pytest.raises(BrokenImage, match="no known image format"):
                read(tmp_path / name)


def test_pipes_folders_and_links_out_of_the_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "secret.png").write_bytes(encoded("PNG"))
    (run / "link.png").symlink_to(tmp_path / "secret.png")
    (run / "folder.png").mkdir()
    os.mkfifo(run / "pipe.png")
    for name, words in {"pipe.png": "a pipe", "folder.png": "a folder", "link.png": "leads out of"}.items():
        for read in (lambda file: own_picture(file, run), lambda file: own_film(file, 9999, run)):
            with pytest.raises(BrokenImage, match=words):
                read(run / name)
    with pytest.raises(FileNotFoundError):
        own_picture(run / "gone.png", run)
    assert own_picture(run / "link.png").size == (32, 24), "a file that the person names may be a link"


def test_a_file_that_is_too_long_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "OWN_MEMORY", 5000)
    (tmp_path / "a.png").write_bytes(encoded("PNG") + bytes(5000))
    with pytest.raises(BrokenImage, match="more than the 4 KiB"):
        own_picture(tmp_path / "a.png")


# --- films ---


def film(frames: int, size: tuple[int, int] = (16, 16)) -> bytes:
    data = io.BytesIO()
    first, *others = [Image.new("RGB", size, (number % 256, number // 256, 0)) for number in range(frames)]
    first.save(data, "WEBP", save_all=True, append_images=others, method=0, lossless=True)
    return data.getvalue()


def test_a_film_is_given_as_it_is_with_its_last_frame(tmp_path: Path) -> None:
    (tmp_path / "a.webp").write_bytes(film(5))
    content, last = own_film(tmp_path / "a.webp", 10**6)
    assert content == film(5) and last.getpixel((3, 3)) == (4, 0, 0)


@pytest.mark.parametrize(
    "content", [encoded("PNG"), b"<svg onload='alert(1)'>", b"RIFF\0\0\0\0WEBPVP8 ", film(5)[:-40]]
)
def test_what_is_no_whole_film_is_not_given(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.webp").write_bytes(content)
    with pytest.raises(BrokenImage):
        own_film(tmp_path / "a.webp", 10**6)


def test_films_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.webp").write_bytes(film(50))
    with pytest.raises(BrokenImage, match="more than the 1 KiB"):
        own_film(tmp_path / "a.webp", 1024)
    monkeypatch.setattr(pictures, "FILM_PIXELS", 16 * 16 * 49)
    with pytest.raises(BrokenImage, match="its 50 frames have more"):
        own_film(tmp_path / "a.webp", 10**6)


# --- what it costs ---


@pytest.mark.parametrize(
    ("depth", "colour", "more"),
    [
        (16, 0, b""),
        (8, 6, b""),
        (16, 6, chunk(b"iCCP", b"x\0\0" + zlib.compress(adobe_rgb()))),
        (8, 4, b""),
        (8, 2, chunk(b"iCCP", b"x\0\0" + zlib.compress(adobe_rgb()))),
    ],
    ids=["16-bit grey", "transparent", "16-bit, transparent, with a profile", "grey and transparent", "with a profile"],
)
def test_memory_of_a_large_picture(depth: int, colour: int, more: bytes) -> None:
    """Two pictures of 4 bytes per pixel, and some pieces; it was up to 26 bytes per pixel."""
    side = 4000
    used = peak_memory(_decode, blank_png(side, depth, colour, more))
    assert used < 8 * side**2 + 60 * 2**20


def _decode(data: bytes) -> None:
    decode(data, "x")


@pytest.mark.parametrize(("depth", "colour"), [(1, 0), (8, 0), (16, 0), (8, 2), (16, 6), (8, 3)])
def test_more_pixels_than_fit_are_refused_before_they_are_decoded(depth: int, colour: int) -> None:
    data, began = blank_png(13_000, depth, colour), time.process_time()
    with pytest.raises(
        BrokenImage, match=r"too many pixels \(169 million\).* MiB of memory, and one image may take 1024"
    ):
        decode(data, "x")
    with pytest.raises(BrokenImage, match="too many pixels"):
        upright_size(data, "x")
    assert time.process_time() - began < 1


def test_photos_of_the_largest_cameras_are_taken() -> None:
    """Phones of 108 million pixels, medium format of 102, also as TIFF of three times 16 bits."""
    bytes_needed = [(4 + 6) * 102e6, pictures._PIXEL_BYTES["JPEG"] * 102e6, pictures._CONVERTED * 109e6]
    assert max(bytes_needed) < pictures.MEMORY


@pytest.mark.parametrize(
    ("kind", "side"), [("WEBP", 8500), ("JPEG2000", 7000), *([("AVIF", 8600)] if features.check("avif") else [])]
)
def test_formats_that_take_more_memory_have_narrower_bounds(
    kind: str, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a thousandth of the pixels, and of the memory."""
    monkeypatch.setattr(pictures, "MEMORY", pictures.MEMORY // 1000)
    data = encoded(kind, size=(side // 32, side // 32))
    with pytest.raises(BrokenImage, match="too many pixels"), opened(Content(data), "x", None, pictures.MEMORY):
        pass


@pytest.mark.parametrize(("width", "height"), [(100_000, 1), (1, 100_000)])
def test_no_side_is_endless(width: int, height: int) -> None:
    with pytest.raises(BrokenImage, match="a side may have 65535 at most"):
        decode(f"P5 {width} {height} 255\n".encode() + bytes(100_000), "x")


@pytest.mark.parametrize(
    "data",
    [
        b"qoif" + struct.pack(">IIBB", 9000, 9000, 3, 0) + b"\xfd" * 10**6,
        b"P1 9000 9000\n" + b"0" * 10**6,
        b"P3 9000 9000 255\n" + b"0 " * 10**6,
        b"BM" + struct.pack("<IHHI", 0, 0, 0, 1078) + struct.pack("<IiiHHIIiiII", 40, 9000, 9000, 1, 8, 1, *[0] * 5)
        + bytes(1024) + b"\1\1" * 10**6,
    ],
    ids=["QOI", "plain PBM", "plain PPM", "packed BMP"],
)  # fmt: skip
def test_decoders_in_python_have_a_bound_of_their_own(data: bytes) -> None:
    with pytest.raises(BrokenImage, match="takes minutes in this format"):
        decode(data, "x")


def test_qoi_of_a_usual_size_is_not_counted() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (700, 800, 3), np.uint8))
    data = io.BytesIO()
    noise.save(data, "QOI")
    assert len(data.getvalue()) > pictures._READS and decode(data.getvalue(), "x").tobytes() == noise.tobytes()


def gif_comments(count: int) -> bytes:
    data = encoded("GIF", "P", (8, 8))
    palette_end = 13 + 3 * 2 ** ((data[10] & 7) + 1)
    return data[:palette_end] + (b"\x21\xfe" + b"\1x\0") * count + data[palette_end:]


@pytest.mark.parametrize(
    "make",
    [
        lambda n: blank_png(9, 8, 2, chunk(b"abCd", b"") * n),
        lambda n: blank_png(9, 8, 2, b"".join(chunk(b"tEXt", b"k%d\0v" % i) for i in range(n))),
        lambda n: b"P6 #" + b"x" * (4 * n) + b"\n10 10 255\n" + bytes(300),
        gif_comments,
    ],
    ids=["chunks", "texts", "a comment of a PPM", "comments of a GIF"],
)
def test_parsers_in_python_come_to_an_end(make: Any) -> None:
    sound, data = make(100), make(700_000)
    decode(sound, "x")
    began = time.process_time()
    with pytest.raises(BrokenImage, match="more than 1048576 parts"):
        decode(data, "x")
    assert time.process_time() - began < 20


def test_text_that_unpacks_to_more() -> None:
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**20 - 10)))
    with pytest.raises(BrokenImage, match="text"):
        decode(blank_png(9, 8, 2, text * 100), "x")
    profile = chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(2**26)))
    assert peak_memory(_refused, blank_png(9, 8, 2, profile)) < 2**25


def _refused(data: bytes) -> None:
    with pytest.raises(BrokenImage):
        decode(data, "x")


def test_a_profile_of_many_megabytes_is_not_used() -> None:
    data = encoded("TIFF", icc_profile=adobe_rgb() + bytes(2**23))
    assert np.array_equal(decode(data, "x"), decode(encoded("TIFF"), "x"))


def test_exif_of_many_megabytes_is_not_read() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    block = exif.tobytes()
    assert decode(encoded("WEBP", exif=block), "x").size == (24, 32)
    assert decode(encoded("WEBP", exif=block + bytes(2**20)), "x").size == (32, 24)


def test_pictures_of_many_threads_share_the_memory() -> None:
    room, most, now, lock = pictures._Room(100), [0], [0], threading.Lock()

    def work(size: int) -> None:
        with room.of(size):
            with lock:
                now[0] += size
                most[0] = max(most[0], now[0])
            time.sleep(0.005)
            with lock:
                now[0] -= size

    threads = [threading.Thread(target=work, args=(size,)) for size in (30, 60, 90, 100, 10) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads) and 60 < most[0] <= 100
    with room.of(500):
        pass  # alone, whatever it takes


def test_too_little_memory_is_told() -> None:
    data = blank_png(9000, 8, 2)
    with memory_limit(200 * 2**20), pytest.raises(BrokenImage, match="there is not enough memory to decode it"):
        decode(data, "x")


# --- damage ---


SOUND = [
    pytest.param(encoded(kind, mode, **options), id=" ".join([kind, mode, *options]))
    for kind, mode, options in [
        ("JPEG", "RGB", {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"}),
        ("JPEG", "CMYK", {"progressive": True}),
        ("MPO", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (32, 24))]}),
        ("PNG", "RGBA", {"icc_profile": adobe_rgb()}),
        ("PNG", "P", {"transparency": 3}),
        ("PNG", "I;16", {}),
        ("WEBP", "RGBA", {"lossless": True, "icc_profile": adobe_rgb()}),
        ("WEBP", "RGB", {}),
        ("BMP", "RGB", {}),
        ("TIFF", "RGB", {"icc_profile": adobe_rgb()}),
        ("TIFF", "F", {}),
        ("TIFF", "CMYK", {"compression": "tiff_lzw"}),
        ("GIF", "P", {"save_all": True, "append_images": [Image.new("P", (32, 24))], "comment": b"a"}),
        ("PPM", "RGB", {}),
        ("QOI", "RGBA", {}),
        *([("AVIF", "RGBA", {})] if features.check("avif") else []),
        *([("JPEG2000", "RGB", {}), ("JPEG2000", "RGBA", {"no_jp2": True})] if features.check("jpg_2000") else []),
    ]
]


@pytest.mark.parametrize("sound", SOUND)
def test_fuzz_decode(sound: bytes) -> None:
    decode(sound, "x")
    _fuzz(sound)


def _fuzz(sound: bytes) -> None:
    @fuzzed
    @given(damaged(sound))
    def each(data: bytes) -> None:
        harmless(lambda: decode(data, "x"))
        harmless(lambda: upright_size(data, "x"))
        harmless(lambda: see_through(data, "x"))
        harmless(lambda: alpha(data, "x"))

    each()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run") / "a.webp"


@fuzzed
@given(content=st.one_of(*(damaged(data) for data in (film(3), encoded("PNG"), encoded("WEBP")))))
def test_fuzz_own_picture(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    harmless(lambda: own_picture(file))
    harmless(lambda: own_film(file, 10**6))


@fuzzed
@given(profile=damaged(adobe_rgb()))
def test_fuzz_profiles(profile: bytes) -> None:
    data = encoded("TIFF", icc_profile=profile)
    assert not isinstance(harmless(lambda: decode(data, "x")), BrokenImage), "a profile does not make it unusable"


def test_every_format_has_a_suffix() -> None:
    assert set(filter(None, FORMATS.values())) == set(READ)
