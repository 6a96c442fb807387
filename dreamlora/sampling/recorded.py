"""Rows of samples.jsonl: which of them show the same thing at other steps, and which files are theirs. No torch.

A picture belongs to its prompt, seed and settings. Its number does not tell which picture it is: a resumed run may have
other prompts, or the same in another order.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import MaxLen
from typing_extensions import TypedDict

from dreamlora.reading import Schema, UnreadableError, json_of, read_bytes, read_lines

PICTURE_BYTES = 2**27
"""Of a picture: more than one of 4096 x 4096 pixels has."""
_PLACE = re.compile(r"step_\d{6,12}/\w[\w.-]{0,200}\.png", re.ASCII)


class _Named(TypedDict):
    file: Annotated[str, MaxLen(255)]
    sha256: Annotated[str, MaxLen(64)]


_NAMED = Schema(_Named)


@dataclass(frozen=True)
class Motif:
    """What a picture shows, whatever the LoRA: a column of the grid.

    Attributes:
        prompt: its text.
        seed: of its noise.
        settings: how it was drawn, in words: "20 denoising steps", "guidance 3", ...; empty if that was not noted.
    """

    prompt: str
    seed: int
    settings: tuple[str, ...]


def motif_of(row: Mapping[str, Any]) -> Motif:
    """What the picture of a row shows; a cell of compare.json has its settings in words."""
    settings = list(row.get("settings", ()))
    if "num_inference_steps" in row:
        settings.append(f"{row['num_inference_steps']} denoising steps")
    if "guidance_scale" in row:
        settings.append(f"guidance {row['guidance_scale']:g}")
    if "scheduler" in row:
        settings.append(str(row["scheduler"]))
    if row.get("negative_prompt"):
        settings.append(f'negative prompt "{row["negative_prompt"]}"')
    return Motif(row["prompt"], row["seed"], tuple(settings))


def motifs_of(rows: Iterable[Mapping[str, Any]]) -> list[Motif]:
    """Every motif once: those that were drawn last come first, then by the numbers that they last had."""
    last: dict[Motif, tuple[int, int, int]] = {}
    for row in sorted(rows, key=lambda row: row["step"]):
        last[motif_of(row)] = (-row["step"], row["prompt_index"], row["image_index"])
    return sorted(last, key=lambda motif: last[motif])


def titles(motifs: Sequence[Motif]) -> list[str]:
    """The prompts, with whatever else tells the motifs apart: seeds if a prompt has several, settings that differ."""
    several = len({motif.prompt for motif in motifs}) < len({(motif.prompt, motif.seed) for motif in motifs})
    shared = common_settings(motifs)
    return [
        " · ".join(
            [
                motif.prompt,
                *([f"seed {motif.seed}"] if several else []),
                *(setting for setting in motif.settings if setting not in shared),
            ]
        )
        for motif in motifs
    ]


def common_settings(motifs: Sequence[Motif]) -> tuple[str, ...]:
    """What all motifs were drawn with."""
    first = motifs[0].settings if motifs else ()
    return tuple(setting for setting in first if all(setting in motif.settings for motif in motifs))


def rows_with_places(folder: Path, rows_file: str, inside: Path) -> Iterator[dict[str, Any]]:
    """The rows of a folder of pictures that say which file is theirs, and what it holds; of others nothing is known.

    Args:
        folder: with the pictures, in folders by step.
        rows_file: its file with rows.
        inside: the run folder, which no link leads out of.
    """
    try:
        for _, line in read_lines(folder / rows_file, inside):
            row = _row(line or b"")
            if row is not None:
                yield row
    except (FileNotFoundError, UnreadableError):
        return


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row: dict[str, Any] = json_of(line)
        _NAMED.check(row)
    except ValueError:
        return None
    return row if _PLACE.fullmatch(row["file"]) else None


def recorded_picture(folder: Path, row: Mapping[str, Any], inside: Path) -> bytes | None:
    """The file of a row, byte for byte as the run has drawn it; None if it is missing, or another."""
    try:
        content = read_bytes(folder / row["file"], PICTURE_BYTES, inside)
    except (FileNotFoundError, UnreadableError):
        return None
    return content if hashlib.sha256(content).hexdigest() == row["sha256"] else None
