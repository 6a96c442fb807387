"""Small files that would keep a decoder busy for minutes, or take gigabytes, are told by their headers."""

from __future__ import annotations

import io
import struct
from typing import Any

import pytest
from PIL import Image

from dreamlora.picture_headers import EXIF_BYTES, MOST_NUMBERS, MOST_SCANS, refuse_bomb


def encoded(kind: str, size: tuple[int, int] = (64, 64), **options: Any) -> bytes:
    data = io.BytesIO()
    Image.radial_gradient("L").resize(size).convert("RGB").save(data, kind, **options)
    return data.getvalue()


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 1}, {"exif": bytes(60_000)}])
def test_usual_jpegs(options: dict[str, Any]) -> None:
    refuse_bomb(encoded("JPEG", (640, 480), **options))
    refuse_bomb(encoded("MPO", save_all=True, append_images=[Image.new("RGB", (64, 64))]))


def test_what_follows_the_end_of_a_jpeg_does_not_count() -> None:
    """Phones put films there, in which any bytes occur."""
    refuse_bomb(encoded("JPEG") + b"\xff\xda\0\2" * 5000)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (segment(0xDA, b"\1\1\0\0\x3f\0") * (MOST_SCANS + 1), "100 scans"),
        (segment(0xFE, b"") * 2500, "2000 segments"),
        (segment(0xE1, b"Exif\0\0" + bytes(65000)) * (EXIF_BYTES // 65000 + 1), "1024 KiB of EXIF"),
        (b"\0\0" + b"\xff\xff\xff" + segment(0xFE, b"") * 2500, "2000 segments"),
    ],
)
def test_jpegs_of_too_many_parts(more: bytes, words: str) -> None:
    sound = encoded("JPEG", progressive=True)
    with pytest.raises(ValueError, match=words):
        refuse_bomb(sound[:2] + more + sound[2:])


def tiff(*tags: tuple[int, int, int, int], order: str = "<", big: bool = False) -> bytes:
    head = b"II" if order == "<" else b"MM"
    if big:
        entries = b"".join(struct.pack(f"{order}HHQQ", *tag) for tag in tags)
        return head + struct.pack(f"{order}HHHQQ", 43, 8, 0, 16, len(tags)) + entries + bytes(8)
    entries = b"".join(struct.pack(f"{order}HHII", *tag) for tag in tags)
    return head + struct.pack(f"{order}HIH", 42, 8, len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "jpeg"])
def test_usual_tiffs(compression: str | None) -> None:
    refuse_bomb(encoded("TIFF", compression=compression, dpi=(72, 72)))


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("order", ["<", ">"])
def test_tiffs_of_too_many_numbers(order: str, big: bool) -> None:
    refuse_bomb(tiff((37724, 7, 2**30, 100), (700, 1, 2**25, 100), order=order, big=big))  # layers stay bytes
    with pytest.raises(ValueError, match="262144 numbers"):
        refuse_bomb(tiff((258, 3, MOST_NUMBERS + 1, 100), order=order, big=big))
    with pytest.raises(ValueError, match="262144 numbers"):
        refuse_bomb(tiff((282, 5, MOST_NUMBERS, 100), (283, 5, 99, 100), order=order, big=big))


@pytest.mark.parametrize("pointer", [34665, 34853, 40965])
@pytest.mark.parametrize(("order", "kind", "shift"), [("<", 4, 0), (">", 4, 0), ("<", 3, 0), (">", 3, 16)])
def test_numbers_of_tags_below_tags_count(pointer: int, order: str, kind: int, shift: int) -> None:
    outer = tiff((pointer, kind, 1, 26 << shift), order=order)
    assert len(outer) == 26
    inner = struct.pack(f"{order}HHHIII", 1, 37500, 5, 10**7, 0, 0)
    with pytest.raises(ValueError, match="numbers"):
        refuse_bomb(outer + inner)


def test_tags_that_lie_in_a_circle() -> None:
    refuse_bomb(tiff((34665, 4, 1, 8), (34853, 4, 1, 8)))


def codestream(layers: int = 1, precinct: int | None = None, **options: Any) -> bytes:
    """A JPEG 2000 whose header says other things than its data."""
    data = encoded("JPEG2000", no_jp2=True, **options)
    place = data.index(b"\xff\x52")
    (length,) = struct.unpack_from(">H", data, place + 2)
    coding = bytearray(data[place : place + 2 + length])
    coding[6:8] = struct.pack(">H", layers)
    if precinct is not None:
        coding[4] |= 1
        coding += bytes([precinct * 17] * (coding[9] + 1))
        coding[2:4] = struct.pack(">H", len(coding) - 2)
    return data[:place] + bytes(coding) + data[place + 2 + length :]


def as_jp2(stream: bytes) -> bytes:
    boxes = encoded("JPEG2000")
    place = boxes.index(b"jp2c")
    return boxes[: place - 4] + struct.pack(">I", len(stream) + 8) + b"jp2c" + stream


@pytest.mark.parametrize("wrap", [bytes, as_jp2])
def test_usual_jpeg_2000(wrap: Any) -> None:
    for options in ({}, {"layers": 25, "precinct": 7}, {"tile_size": (16, 16)}):
        refuse_bomb(wrap(codestream(size=(500, 400), **options)))


@pytest.mark.parametrize("wrap", [bytes, as_jp2])
@pytest.mark.parametrize(
    "options",
    [
        {"layers": 65535},
        {"layers": 65535, "tile_size": (16, 16)},
        {"precinct": 1, "size": (1000, 1000)},
        {"tile_size": (2, 2), "size": (300, 300)},
    ],
)
def test_jpeg_2000_of_too_many_packets(wrap: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"tiles with \d+ precincts in \d+ layers"):
        refuse_bomb(wrap(codestream(**options)))


def test_tiles_of_jpeg_2000_cannot_say_otherwise() -> None:
    data = codestream()
    for marker in (b"\xff\x52", b"\xff\x53", b"\xff\x5f"):
        for place in (data.index(b"\xff\x93"), data.index(b"\xff\x90")):
            with pytest.raises(ValueError, match=r"different ways|layers"):
                refuse_bomb(data[:place] + marker + b"\0\x0c\0\0\xff\xff\0\5\4\4\0\0" + data[place:])


def test_a_file_that_is_cut_is_left_to_the_decoder() -> None:
    for data in (encoded("JPEG"), encoded("TIFF"), encoded("JPEG2000"), codestream()):
        for end in range(0, 200, 3):
            refuse_bomb(data[:end])
