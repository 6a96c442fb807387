"""The sample images of a comparison: for every prompt, steps × methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dreamlora.figures import loss, rate, value_of
from dreamlora.report import pictures
from dreamlora.report.comparison import ComparisonFile
from dreamlora.report.pictures import Picture
from dreamlora.sampling.grid import MAX_COLUMNS, shown_steps
from dreamlora.sampling.recorded import Motif, common_settings, motif_of, motifs_of
from dreamlora.schemas import lies_below

_PIXELS = 192
_REFERENCE_PIXELS = 128
_REFERENCES = 8
JsonObject = dict[str, Any]


@dataclass(frozen=True)
class Shot:
    """One method's image of a prompt at a step.

    Attributes:
        method: its number.
        picture: None if there is none.
        reason: why there is none.
        loss: at that step; empty if it was not measured there.
    """

    method: int
    picture: Picture | None
    reason: str
    loss: str


@dataclass(frozen=True)
class PromptView:
    """All images of one prompt, seed and settings: a row of shots, one per method, for every step of the gallery.

    ``settings`` has, in words, what other views were drawn without.
    """

    prompt: str
    seed: int
    settings: str
    rows: tuple[tuple[Shot, ...], ...]


@dataclass(frozen=True)
class SampleGallery:
    """Everything that is shown.

    Attributes:
        steps: ascending; 0 is the base model.
        runs: by method, which run the images are of.
        left_out: how many of the steps and images are shown; empty if all are.
    """

    steps: tuple[int, ...]
    views: tuple[PromptView, ...]
    runs: tuple[tuple[int, str], ...]
    references: tuple[Picture, ...]
    left_out: str


def gallery(comparison: ComparisonFile) -> SampleGallery | None:
    """The images that compare.json names, made small; None if it names none."""
    drawn = [(number, method["samples"]) for number, method in enumerate(comparison.methods) if method["samples"]]
    cells = [cell for _, samples in drawn for cell in samples["cells"]]
    if not cells:
        return None
    steps = sorted({cell["step"] for cell in cells})
    motifs = motifs_of(cells)
    shared = common_settings(motifs)
    kept_steps = shown_steps(steps)
    cells_of = {number: _by_place(samples["cells"]) for number, samples in drawn}
    views = []
    for motif in motifs[:MAX_COLUMNS]:
        rows = tuple(
            tuple(_shot(comparison, number, step, cells_of[number].get((step, motif))) for number, _ in drawn)
            for step in kept_steps
        )
        own = ", ".join(setting for setting in motif.settings if setting not in shared)
        views.append(PromptView(motif.prompt, motif.seed, own, rows))
    return SampleGallery(
        steps=tuple(kept_steps),
        views=tuple(views),
        runs=tuple((number, _run(samples)) for number, samples in drawn),
        references=_references(comparison, drawn[0][1]),
        left_out=_left_out((len(kept_steps), len(steps)), (len(views), len(motifs))),
    )


def _run(samples: JsonObject) -> str:
    return f"learning rate {rate(samples['lr'])}, training seed {samples['training_seed']}"


def _by_place(cells: Sequence[JsonObject]) -> dict[tuple[int, Motif], JsonObject]:
    """The first cell of every step and motif."""
    return {(cell["step"], motif_of(cell)): cell for cell in reversed(cells)}


def _shot(comparison: ComparisonFile, number: int, step: int, cell: JsonObject | None) -> Shot:
    samples = comparison.methods[number]["samples"]
    measured = samples["losses"].get(str(step))
    loss_text = loss(measured) if value_of(measured) is not None else ""
    if cell is None or not cell["file"]:
        return Shot(number, None, "not drawn", loss_text)
    if not lies_below(cell["file"]):
        return Shot(number, None, "lies outside the comparison's folder: compare anew", loss_text)
    picture = pictures.embedded(comparison.folder / cell["file"], _PIXELS, comparison.folder)
    return Shot(number, picture, "" if picture else "file is missing", loss_text)


def _references(comparison: ComparisonFile, samples: JsonObject) -> tuple[Picture, ...]:
    names = [name for name in samples["references"] if lies_below(name)]
    files = [comparison.folder / name for name in names[:_REFERENCES]]
    return tuple(
        picture for file in files if (picture := pictures.embedded(file, _REFERENCE_PIXELS, comparison.folder))
    )


def _left_out(steps: tuple[int, int], prompts: tuple[int, int]) -> str:
    parts = [
        f"{count} of {total} {noun}"
        for (count, total), noun in ((steps, "steps"), (prompts, "images per step"))
        if count < total
    ]
    return f"Shown: {' and '.join(parts)}." if parts else ""
