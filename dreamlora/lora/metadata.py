"""What a LoRA's file says of itself besides its tensors: Stability's ModelSpec, kohya's ``ss_`` keys, and our own.

Sources: https://github.com/Stability-AI/ModelSpec (1.0.1); kohya's sd-scripts, ``train_network.py`` and
``library/train_util.py``. The hash that ModelSpec asks for, of all tensors' bytes in the order of the file, is also
what Civitai calls AutoV3 and A1111 ``sshs_model_hash``.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from dreamlora.lora.settings import METADATA_KEY
from dreamlora.reading import opened

SPEC = "modelspec.sai_model_spec"
SPEC_VERSION = "1.0.1"
DATE = "modelspec.date"
IMPLEMENTATION = "modelspec.implementation"
_HASH, _HASH_OF_OTHERS = "modelspec.hash_sha256", "sshs_model_hash"
_SAMPLED_FROM, _SAMPLED = 2**20, 2**16
"""The bytes of a model that A1111's old hash was of."""
TIMES = (DATE,)
"""What differs between files that are otherwise the same."""
_OF_THE_BYTES = {_HASH, _HASH_OF_OTHERS, "sshs_legacy_hash", METADATA_KEY, "format"}
"""What is true of one file's tensors and no other's."""


def now() -> str:
    """This second in UTC, as ModelSpec has dates."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def carried(metadata: Mapping[str, str]) -> dict[str, str]:
    """What is still true of a file's adapter when it is written in another format, precision or rank."""
    return {key: value for key, value in metadata.items() if key not in _OF_THE_BYTES}


def hashes_of(model: Path) -> dict[str, str]:
    """kohya's entries for a base model in one file: its SHA-256, and the short hash that A1111 had before.

    Raises:
        FileNotFoundError, UnreadableError: it cannot be read.
    """
    with opened(model) as stream:
        whole = hashlib.sha256()
        while chunk := stream.read(2**20):
            whole.update(chunk)
        stream.seek(_SAMPLED_FROM)
        short = hashlib.sha256(stream.read(_SAMPLED)).hexdigest()[:8]
    return {"ss_new_sd_model_hash": whole.hexdigest(), "ss_sd_model_hash": short}


def serialised(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file whose metadata is in one order, with the hash of its tensors where it is described at all.

    safetensors writes metadata in random order, and equal adapters are to give equal files.
    """
    plain = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    (length,) = struct.unpack("<Q", plain[:8])
    header, body = json.loads(plain[8 : 8 + length]), plain[8 + length :]
    own = {"format": "pt", **metadata}
    if IMPLEMENTATION in own:
        digest = hashlib.sha256(body).hexdigest()
        own |= {_HASH: f"0x{digest}", _HASH_OF_OTHERS: digest}
    text = json.dumps({"__metadata__": dict(sorted(own.items())), **header}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body
