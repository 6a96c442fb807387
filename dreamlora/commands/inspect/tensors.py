"""Tensors of a safetensors file as numpy arrays, whatever their precision: numpy has neither bfloat16 nor float8."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dreamlora.archives import open_tensors
from dreamlora.reading import UnreadableError, opened

Array = NDArray[Any]

_TYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("u1"),
}
"""Those of numpy, by safetensors' names."""
_CHUNK = 2**20


@dataclass(frozen=True)
class Digests:
    """SHA-256 sums in hexadecimal.

    Attributes:
        file: of all of it.
        tensors: of all bytes behind the header.
    """

    file: str
    tensors: str


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file that is open.

    Attributes:
        path: the file.
        stream: of its bytes.
        size: in bytes.
        shapes, types: of all tensors by name; types are safetensors' ("BF16").
        metadata: of the header.
    """

    path: Path
    stream: BinaryIO
    size: int
    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, str]
    metadata: Mapping[str, str]
    _start: int
    _places: Mapping[str, tuple[int, int]]

    def numbers(self, name: str) -> Array | None:
        """A tensor in float32, or float64 if it is stored so; None for types of other than real numbers.

        Raises:
            UnreadableError: the file was cut short meanwhile.
        """
        decode = _decoder(self.types[name])
        if decode is None:
            return None
        begin, end = self._places[name]
        self.stream.seek(self._start + begin)
        content = self.stream.read(end - begin)
        if len(content) != end - begin:
            raise UnreadableError(self.path, f"it ends within {name}: copy it again")
        return decode(content).reshape(self.shapes[name])

    def digests(self) -> Digests:
        """Reads all of the file."""
        self.stream.seek(0)
        whole = hashlib.sha256(self.stream.read(self._start))
        tensors = hashlib.sha256()
        while chunk := self.stream.read(_CHUNK):
            whole.update(chunk)
            tensors.update(chunk)
        return Digests(whole.hexdigest(), tensors.hexdigest())


@contextmanager
def tensor_file(path: Path, inside: Path | None = None) -> Iterator[TensorFile]:
    """Open a safetensors file whose header is sound; no tensor is read by this.

    Args:
        path: of the file.
        inside: see ``reading.opened``.

    Raises:
        FileNotFoundError, UnreadableError: see ``archives.open_tensors``.
    """
    with open_tensors(path, "np", inside) as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - no iterator
        shapes = {name: tuple(one.get_shape()) for name, one in slices.items()}
        types = {name: str(one.get_dtype()) for name, one in slices.items()}
        metadata = dict(tensors.metadata() or {})
    with opened(path, inside) as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
        places = {name: tuple(header[name]["data_offsets"]) for name in shapes}
        size = os.fstat(stream.fileno()).st_size
        yield TensorFile(path, stream, size, shapes, types, metadata, 8 + length, places)


def _decoder(kind: str) -> Any:
    """From bytes to numbers."""
    if kind == "BF16":
        return _bfloat16
    if kind == "F8_E5M2":
        return _float8_e5m2
    if kind == "F8_E4M3":
        return _float8_e4m3
    if kind in _TYPES:
        return lambda content: _plain(content, _TYPES[kind])
    return None


def _plain(content: bytes, dtype: np.dtype[Any]) -> Array:
    array = np.frombuffer(content, dtype)
    return array if dtype.itemsize == 8 and dtype.kind == "f" else array.astype(np.float32)


def _bfloat16(content: bytes) -> Array:
    """The upper half of a float32."""
    return (np.frombuffer(content, "<u2").astype(np.uint32) << 16).view(np.float32)


def _float8_e5m2(content: bytes) -> Array:
    """The upper half of a float16."""
    return (np.frombuffer(content, "u1").astype(np.uint16) << 8).view(np.float16).astype(np.float32)


def _float8_e4m3(content: bytes) -> Array:
    """A sign, 4 bits of the exponent with bias 7 and 3 of the fraction; no infinities, NaN where all bits are set."""
    codes = np.arange(256)
    exponent, fraction = codes >> 3 & 15, codes & 7
    values = np.where(exponent > 0, (8 + fraction) * 2.0 ** (exponent - 10), fraction * 2.0**-9)
    values = np.where(codes & 127 == 127, np.nan, values) * np.where(codes & 128, -1, 1)
    return values.astype(np.float32)[np.frombuffer(content, "u1")]
