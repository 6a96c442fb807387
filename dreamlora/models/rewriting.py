"""A safetensors file written anew with some of its tensors changed, one after the other: a model of 24 GB takes the
memory of its largest tensor. All else stays as it is, byte for byte.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dreamlora.archives import open_tensors
from dreamlora.errors import UserError
from dreamlora.files import replacing
from dreamlora.models.weights import MOST_TENSORS

KINDS = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
"""Of numbers that weights are stored in, as safetensors calls them."""
_DTYPES = {kind: dtype for dtype, kind in KINDS.items()}
_ALIGNED = 8
_CHUNK = 2**24


@dataclass(frozen=True)
class Rewriting:
    """What is to be changed in a file.

    Attributes:
        changes: by tensor what makes another of it, of the same shape; it is rounded to the precision of the file.
        dtype: of all floating-point tensors that ``converted`` names; None: as they are.
        converted: whether a tensor is to have that precision.
        metadata: for the header; None: as it is.
    """

    changes: Mapping[str, Callable[[Tensor], Tensor]]
    dtype: torch.dtype | None = None
    converted: Callable[[str], bool] = lambda name: True
    metadata: Mapping[str, str] | None = None
    done: Callable[[str], None] = field(default=lambda name: None)


def rewrite(source: Path, target: Path, rewriting: Rewriting) -> int:
    """Write the file; returns the bytes that its tensors have.

    Raises:
        UserError: the source is no safetensors file; or a number that comes out is too large for its precision.
        WriteError: the system refused.
    """
    with (
        open_tensors(source, most=MOST_TENSORS) as tensors,
        source.open("rb") as stream,
        replacing(target) as temporary,
    ):
        length = struct.unpack("<Q", stream.read(8))[0]
        header: dict[str, Any] = json.loads(stream.read(length))
        start = 8 + length
        metadata = header.pop("__metadata__", {})
        names = sorted(header, key=lambda name: header[name]["data_offsets"])
        kinds = {name: _kind(name, header[name]["dtype"], rewriting) for name in names}
        new, total = _new_header(header, names, kinds)
        with temporary.open("wb") as out:
            _write_header(out, new, metadata if rewriting.metadata is None else rewriting.metadata)
            for name in names:
                change = rewriting.changes.get(name)
                if change or kinds[name] != header[name]["dtype"]:
                    tensor = tensors.get_tensor(name)
                    _write_tensor(out, source, name, change(tensor) if change else tensor, _DTYPES[kinds[name]])
                else:
                    begin, end = header[name]["data_offsets"]
                    stream.seek(start + begin)
                    _copy(stream, out, end - begin)
                rewriting.done(name)
    return total


def _kind(name: str, own: str, rewriting: Rewriting) -> str:
    wanted = rewriting.dtype is not None and own in _DTYPES and rewriting.converted(name)
    return KINDS[rewriting.dtype] if wanted and rewriting.dtype else own


def _new_header(header: Mapping[str, Any], names: list[str], kinds: Mapping[str, str]) -> tuple[dict[str, Any], int]:
    """The entries, and the bytes of all tensors."""
    new: dict[str, Any] = {}
    place = 0
    for name in names:
        begin, end = header[name]["data_offsets"]
        size = end - begin
        if kinds[name] != header[name]["dtype"]:
            size = math.prod(header[name]["shape"]) * _DTYPES[kinds[name]].itemsize
        new[name] = {"dtype": kinds[name], "shape": header[name]["shape"], "data_offsets": [place, place + size]}
        place += size
    return new, place


def _write_header(out: BinaryIO, entries: Mapping[str, Any], metadata: Mapping[str, str]) -> None:
    whole = {**({"__metadata__": dict(metadata)} if metadata else {}), **entries}
    text = json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    out.write(struct.pack("<Q", len(text)) + text)


def _write_tensor(out: BinaryIO, source: Path, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    rounded = tensor.to(dtype).contiguous()
    if not bool(rounded.isfinite().all()):
        if bool(tensor.isfinite().all()):
            raise UserError(
                f"{source}: {name} does not fit {str(dtype).removeprefix('torch.')} any more, its largest number "
                f"is {float(tensor.abs().max()):g}: give --dtype bf16 or fp32, or smaller --lora_scales"
            )
        raise UserError(f"{source}: {name} is not finite: the model or the LoRA is damaged")
    out.write(rounded.flatten().view(torch.uint8).numpy().data)


def _copy(stream: BinaryIO, out: BinaryIO, size: int) -> None:
    while size:
        part = stream.read(min(size, _CHUNK))
        if not part:
            raise EOFError
        out.write(part)
        size -= len(part)
