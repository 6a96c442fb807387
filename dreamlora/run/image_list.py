"""images.jsonl: every image of a run with its captions, and what of that changed since a checkpoint was written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamlora.data.images import ImageRecord
from dreamlora.files import replacing
from dreamlora.jsonl import read_jsonl
from dreamlora.reading import legible
from dreamlora.run.images import RunImages
from dreamlora.schemas import IMAGE_ROW

TRAINED, HELD_OUT, CLASS = "trained", "held out", "class"
NAMED = 3
"""Images that are told by name of each kind of change."""


def write(file: Path, pictures: RunImages) -> None:
    """A row for every image: file, what it is for, hash, captions, and the hashes of what belongs to it."""
    with replacing(file) as temporary, temporary.open("w", encoding="utf-8") as rows:
        rows.writelines(json.dumps(row) + "\n" for row in _rows(pictures))


def fingerprint(records: Iterable[ImageRecord]) -> str:
    """16 hex digits of images, captions and what belongs to them, in their order; names do not count."""
    digest = hashlib.sha256()
    for record in records:
        beside = "".join(f" {kind} {other.content_hash()}" for kind, other in _beside(record))
        digest.update("\n".join((f"{record.content_hash()} {record.caption}{beside}", *record.other_captions)).encode())
    return digest.hexdigest()[:16]


def changes(file: Path, pictures: RunImages) -> str:
    """What is not as ``file`` says, in words; "" if all images are known to be the same."""
    before = {row["name"]: row for row in read_jsonl(file, IMAGE_ROW) if row["role"] != CLASS}
    if not before:
        return "which ones is not known, as the run is of an older version"
    now = {row["name"]: row for row in _rows(pictures) if row["role"] != CLASS}
    gone = {row["sha256"]: name for name, row in before.items() if name not in now}
    added, renamed = [], []
    for name in (name for name in now if name not in before):
        old = gone.pop(now[name]["sha256"], None)
        added += [] if old else [name]
        renamed += [f"{old} to {name}"] if old else []
    both = [(name, before[name], now[name]) for name in now if name in before]
    return "; ".join(
        f"{kind}: {_some(names)}"
        for kind, names in {
            "added": added,
            "removed": list(gone.values()),
            "renamed": renamed,
            "another picture": [name for name, old, new in both if old["sha256"] != new["sha256"]],
            "another caption": [_caption(*each) for each in both if each[1]["captions"] != each[2]["captions"]],
            "another mask": [name for name, old, new in both if old.get("mask") != new.get("mask")],
            "another conditioning image": [
                name for name, old, new in both if old.get("conditioning") != new.get("conditioning")
            ],
            "no longer held out": [name for name, old, new in both if old["role"] == HELD_OUT != new["role"]],
            "held out now": [name for name, old, new in both if new["role"] == HELD_OUT != old["role"]],
        }.items()
        if names
    )


def _rows(pictures: RunImages) -> Iterator[dict[str, Any]]:
    parts = ((TRAINED, pictures.train), (HELD_OUT, pictures.held_out), (CLASS, pictures.classes))
    for role, record in ((role, record) for role, records in parts for record in records):
        captions = list(map(legible, record.captions))
        row = {"name": legible(record.name), "role": role, "sha256": record.content_hash(), "captions": captions}
        yield row | {kind: other.content_hash() for kind, other in _beside(record)}


def _beside(record: ImageRecord) -> Iterator[tuple[str, ImageRecord]]:
    """What belongs to an image, by kind."""
    for kind, other in (("mask", record.mask), ("conditioning", record.conditioning)):
        if other:
            yield kind, other


def _caption(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    then, now = (" | ".join(row["captions"]) for row in (old, new))
    return f"{name} ({then!r} then, {now!r} now)"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
