"""Safetensors files, and zip archives of arrays (numpy's .npz, torch's .pt): what their headers promise is checked
before it is believed.

Both kinds hold nothing but data; still a small file may promise a million tensors, or unpack to more than there is
memory. No torch here.
"""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

from safetensors import SafetensorError, safe_open

from dreamlora.reading import LARGEST, UnreadableError, opened, shortened, shortened_text

HEADER_BYTES = 2**24
"""Of a safetensors file; kohya's statistics of tags have a megabyte or two, 38,000 tensors of a model four."""
TENSORS = 2**15
"""In one file: a LoRA of all layers of FLUX has some 2,000, with an alpha for each pair 3,000."""
NAME_LENGTH = 2**9
_MOST_SIDES = 16
"""Of a tensor; five in a video model."""
_DIRECTORY_BYTES = 2**23
"""Of a zip archive: that of 10,000 tensors has a tenth of it."""

_DAMAGED = (zipfile.BadZipFile, EOFError, KeyError, NotImplementedError, RuntimeError, UnicodeDecodeError, struct.error)
"""What zipfile says of archives that nobody has written so."""


@contextmanager
def open_tensors(
    file: Path, framework: Literal["pt", "np"] = "pt", inside: Path | None = None, most: int = TENSORS
) -> Iterator[Any]:
    """A safetensors file, as ``safe_open`` gives it; no tensor is read by this.

    Args:
        file: to read.
        framework: whose tensors it gives.
        inside: see ``reading.opened``.
        most: tensors.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableError: it is none, also if that is found while it is used; or it has more tensors, or other names or
            shapes, than such files have; or see ``reading.opened``.
    """
    with opened(file, inside) as stream:
        beginning = stream.read(8)
    if beginning == b"version ":
        raise UnreadableError(file, "it is a pointer of git-lfs, not the file itself: run `git lfs pull` there")
    if len(beginning) == 8 and struct.unpack("<Q", beginning)[0] > HEADER_BYTES:
        raise UnreadableError(file, f"it is damaged or not a safetensors file (a header of over {HEADER_BYTES} bytes)")
    try:
        with safe_open(file, framework=framework) as tensors:
            _check_header(file, tensors, most)
            yield tensors
    except SafetensorError as error:
        raise UnreadableError(
            file, f"it is damaged or not a safetensors file ({shortened_text(str(error))})"
        ) from error


def _check_header(file: Path, tensors: Any, most: int) -> None:
    """Raises UnreadableError for names and shapes that no such file has; an empty tensor may have any other sides."""
    names: Sequence[str] = tensors.keys()
    if len(names) > most:
        raise UnreadableError(file, f"it names {len(names)} tensors, and such files have at most {most}")
    for name in names:
        if len(name) > NAME_LENGTH or not name.isprintable():
            raise UnreadableError(file, f"no tensor can have the name {shortened(name)}")
        shape = tensors.get_slice(name).get_shape()
        if len(shape) > _MOST_SIDES or math.prod(side or 1 for side in shape) > LARGEST:
            raise UnreadableError(file, f"{name} cannot have the shape {shortened_text(str(shape))}")


def check_archive(stream: BinaryIO) -> zipfile.ZipFile:
    """A zip archive of plain entries: what comes out of it is no larger than the file itself.

    Args:
        stream: of the whole file; its place is changed.

    Raises:
        ValueError: it is no archive, it is packed or encrypted, or its entries overlap or share names.
    """
    size = stream.seek(0, 2)
    stream.seek(0)
    if stream.read(4) != b"PK\x03\x04":  # zipfile finds an archive behind anything, other readers do not
        raise ValueError("it is no archive")
    try:
        source = _Bounded(stream)
        archive = zipfile.ZipFile(source)
    except (*_DAMAGED, OSError) as error:
        raise ValueError(f"it is no archive ({shortened_text(str(error))})") from error
    source.most = size
    entries = archive.infolist()
    names = {entry.filename.casefold() for entry in entries}
    if len(names) != len(entries):
        raise ValueError("two of its entries have the same name")
    plain = all(
        entry.compress_type == zipfile.ZIP_STORED and entry.file_size == entry.compress_size and not entry.flag_bits & 1
        for entry in entries
    )
    if not plain:
        raise ValueError("its entries are packed or encrypted")
    if sum(entry.file_size for entry in entries) > size:
        raise ValueError("its entries overlap")
    return archive


def read_entry(archive: zipfile.ZipFile, name: str | zipfile.ZipInfo) -> bytes:
    """What an archive holds under a name.

    Raises:
        ValueError: nothing, or it is damaged.
    """
    try:
        return archive.read(name)
    except _DAMAGED as error:
        raise ValueError(f"it is damaged ({shortened_text(str(error))})") from error


class _Bounded:
    """A file that gives no more than ``most`` at once: zipfile reads the whole directory in one go."""

    most = _DIRECTORY_BYTES

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.seek, self.tell, self.seekable = stream.seek, stream.tell, stream.seekable

    def read(self, size: int = -1) -> bytes:
        if size > self.most:
            raise OSError("its directory is larger than any")
        return self._stream.read(size)
