"""What a picture's file claims to hold, looked at before a decoder believes it.

Pillow and the libraries below it bound pixels, and do what a few bytes ask for otherwise: go over all pixels once for
each of a million scans (JPEG), keep a record for every packet of a 2 x 2 precinct (JPEG 2000), unpack a tag of a
hundred million numbers (TIFF). No program that makes pictures comes near the bounds here.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from math import ceil

MOST_SCANS = 100
"""Of a JPEG; progressive ones have about ten."""
MOST_SEGMENTS = 2000
"""Of a JPEG, 64 KiB each at most: profiles, previews, depth maps."""
EXIF_BYTES = 2**20
"""A JPEG's single segment can have 64 KiB; other formats have no bound of their own."""
MOST_NUMBERS = 2**18
"""In the tags of a TIFF, which are mostly the places of its strips or tiles."""
MOST_TILES = 2**14
MOST_PRECINCTS = 2**17
MOST_PACKETS = 2**20
"""Of a JPEG 2000: archives have 25 layers of some thousand precincts."""

_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
"""Of a JPEG: what follows 0xff and is no part of the compressed data."""
_BYTES = {1, 2, 6, 7}
"""A TIFF's types of values that stay bytes."""
_WHOLE = {3: "H", 4: "I", 8: "h", 9: "i", 13: "I", 16: "Q"}
_FOLDERS = {34665, 34853, 40965}
"""A TIFF's tags with the place of more tags, all of which Pillow unpacks: of Exif, GPS and interoperability."""
_CODING = {b"\xff\x52", b"\xff\x53", b"\xff\x5f"}
"""JPEG 2000: how all or single components are coded, and in which order."""


def refuse_bomb(data: bytes) -> None:
    """Nothing, if a picture's file claims no more than one that somebody made.

    Raises:
        ValueError: it claims more; the text says what.
    """
    try:
        if data.startswith(b"\xff\xd8"):
            _check_jpeg(data)
        elif data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            _check_tiff(data)
        elif data.startswith(b"\xff\x4f\xff\x51"):
            _check_codestream(data, 0)
        elif data.startswith(b"\0\0\0\x0cjP  "):
            for place in _codestreams(data):
                _check_codestream(data, place)
    except (struct.error, IndexError):  # it is cut: the decoder has the words for that
        pass


def _check_jpeg(data: bytes) -> None:
    place, segments, scans, exif = 2, 0, 0, 0
    while found := _MARKER.search(data, place):
        kind, place = data[found.end() - 1], found.end()
        if kind == 0xD9:
            return
        if kind in (0x01, 0xD8):  # they have no length
            continue
        (length,) = struct.unpack_from(">H", data, place)
        segments, scans = segments + 1, scans + (kind == 0xDA)
        exif += length if kind == 0xE1 and data.startswith(b"Exif\0", place + 2) else 0
        place += max(length, 2)
        if scans > MOST_SCANS or segments > MOST_SEGMENTS:
            raise ValueError(f"it has more than {MOST_SCANS} scans, or {MOST_SEGMENTS} segments")
        if exif > EXIF_BYTES:
            raise ValueError(f"it has more than {EXIF_BYTES >> 10} KiB of EXIF")


def _check_tiff(data: bytes) -> None:
    order, big = "<" if data.startswith(b"II") else ">", b"+" in data[2:4]
    count_type, entry = ("Q", "HHQ8s") if big else ("H", "HHI4s")
    size = struct.calcsize(f"{order}{entry}")
    waiting = list(struct.unpack_from(order + ("Q" if big else "I"), data, 8 if big else 4))
    numbers, seen = 0, set[int]()
    while waiting:
        place = waiting.pop()
        if place in seen or place >= len(data):
            continue
        seen.add(place)
        (count,) = struct.unpack_from(order + count_type, data, place)
        start = place + struct.calcsize(f"{order}{count_type}")
        whole = min(count, (len(data) - start) // size, MOST_NUMBERS)
        for tag, kind, length, value in struct.iter_unpack(order + entry, data[start : start + whole * size]):
            numbers += 0 if kind in _BYTES else length
            if tag in _FOLDERS and kind in _WHOLE:
                waiting.append(struct.unpack_from(order + _WHOLE[kind], value)[0])
        numbers += whole
        if numbers > MOST_NUMBERS:
            raise ValueError(f"its tags have more than {MOST_NUMBERS} numbers")


def _codestreams(data: bytes) -> Iterator[int]:
    """Where the compressed images of a .jp2 file begin."""
    place = 0
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        head = 8
        if length == 1:
            (length,), head = struct.unpack_from(">Q", data, place + 8), 16
        if kind == b"jp2c":
            yield place + head
        if length < head:  # 0: to the end
            return
        place += length


def _check_codestream(data: bytes, start: int) -> None:
    """Of a JPEG 2000: how many tiles, precincts and packets its headers ask for (T.800, annex A)."""
    right, bottom, left, top, across, down, tile_left, tile_top = struct.unpack_from(">8I", data, start + 8)
    (components,) = struct.unpack_from(">H", data, start + 40)
    if not across or not down:
        raise ValueError("its tiles have no size")
    tiles = max(ceil((right - tile_left) / across) * ceil((bottom - tile_top) / down), 1)
    tile = min(across, max(right - left, 1)), min(down, max(bottom - top, 1))
    place, precincts, layers = start + 2, components, 1
    while data[place : place + 2] != b"\xff\x90":  # the first tile
        marker, length = data[place : place + 2], *struct.unpack_from(">H", data, place + 2)
        if marker == b"\xff\x52":
            (layers,) = struct.unpack_from(">H", data, place + 6)
            precincts = components * _precincts(tile, data[place + 9], data[place + 4] & 1, data[place + 14 :])
        elif marker in _CODING:
            raise ValueError("its components are coded in different ways")
        place += 2 + max(length, 2)
    _refuse_coding_of_tiles(data, place)
    if tiles > MOST_TILES or tiles * precincts > MOST_PRECINCTS or tiles * precincts * layers > MOST_PACKETS:
        raise ValueError(f"it has {tiles} tiles with {precincts} precincts in {layers} layers: save it anew")


def _precincts(tile: tuple[int, int], levels: int, given: int, sizes: bytes) -> int:
    """Of one component of a tile, over all its resolutions; each is half as large as the next."""
    if not given:
        return levels + 1
    count = 0
    for level in range(levels + 1):
        shrunk = 1 << (levels - level)
        across, down = shrunk << (sizes[level] & 15), shrunk << (sizes[level] >> 4)
        count += (ceil(tile[0] / across) + 1) * (ceil(tile[1] / down) + 1)
    return count


def _refuse_coding_of_tiles(data: bytes, place: int) -> None:
    """Tiles could change all that was said for the whole."""
    while data[place : place + 2] == b"\xff\x90":
        (length,) = struct.unpack_from(">I", data, place + 6)
        header = place + 12
        while data[header : header + 2] != b"\xff\x93":  # the data of the tile
            if data[header : header + 2] in _CODING:
                raise ValueError("its tiles are coded in different ways")
            header += 2 + max(struct.unpack_from(">H", data, header + 2)[0], 2)
        if not length:
            return
        place += max(length, 12)
