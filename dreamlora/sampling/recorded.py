"""Rows of samples.jsonl: which of them show the same thing at other steps, and which files are theirs. No torch.

A picture belongs to its prompt, seed and settings. Its number does not tell which picture it is: a resumed run may have
other prompts, or the same in another order.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamlora.jsonl import read_jsonl
from dreamlora.reading import UnreadableError, read_bytes
from dreamlora.schemas import SAMPLE_ROW

PICTURE_BYTES = 2**27
"""Of a picture: more than one of 4096 x 4096 pixels has."""
_PLACE = re.compile(r"step_\d{6,12}/\w[\w.-]{0,200}\.png", re.ASCII)


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


def rows_with_places(file: Path, inside: Path) -> list[dict[str, Any]]:
    """The rows of samples.jsonl that say where their picture lies, and what it holds; of others nothing is known.

    Args:
        file: with the rows, beside the folders of pictures by step.
        inside: the run folder, which no link leads out of.
    """
    rows = read_jsonl(file, SAMPLE_ROW, inside)
    return [row for row in rows if "sha256" in row and _PLACE.fullmatch(row["file"])]


def recorded_picture(folder: Path, row: Mapping[str, Any], inside: Path) -> bytes | None:
    """The file of a row, byte for byte as the run has drawn it; None if it is missing, or another."""
    try:
        content = read_bytes(folder / row["file"], PICTURE_BYTES, inside)
    except (FileNotFoundError, UnreadableError):
        return None
    return content if hashlib.sha256(content).hexdigest() == row["sha256"] else None
