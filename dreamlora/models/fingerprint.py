"""What a model folder holds, in 12 hex digits, cheaply enough for tens of gigabytes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

HEAD = 2**16
WHOLE = 64 * 2**20
"""Files up to this many bytes are read whole (about 0.05 s); of longer ones a sample is read."""
BLOCKS = 128
BLOCK = 4096


def fingerprint(folder: Path) -> str:
    """Hash of the names, sizes and contents of all files below a folder; hidden files and README are left out.

    Of a long file come the first 64 KiB (the header of most safetensors files) and 128 evenly spaced blocks of 4 KiB up
    to its end, 0.6 MB in all. Training or merging changes nearly every weight, so the sample sees it; an edit of a few
    chosen bytes in gigabytes can be missed. Times of modification do not count: a copied folder keeps its id.
    """
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = file.relative_to(folder).as_posix()
        if any(part.startswith(".") for part in Path(name).parts) or file.suffix == ".md":
            continue
        size = file.stat().st_size
        digest.update(f"{name}\0{size}\0".encode())
        _sample(file, size, digest)
    return digest.hexdigest()[:12]


def file_fingerprint(file: Path, *parts: str) -> str:
    """The same of one safetensors file, whatever it is called, and of texts. Of a long file the whole header counts."""
    digest = hashlib.sha256(json.dumps(parts).encode())
    size = file.stat().st_size
    digest.update(f"{size}\0".encode())
    with file.open("rb") as stream:
        header = 8 + int.from_bytes(stream.read(8), "little")
    _sample(file, size, digest, max(header, HEAD))
    return digest.hexdigest()[:12]


def _sample(file: Path, size: int, digest: hashlib._Hash, head: int = HEAD) -> None:
    with file.open("rb") as stream:
        if size <= WHOLE:
            while chunk := stream.read(2**20):
                digest.update(chunk)
            return
        digest.update(stream.read(head))
        for block in range(BLOCKS):
            stream.seek(block * (size - BLOCK) // (BLOCKS - 1))
            digest.update(stream.read(BLOCK))
