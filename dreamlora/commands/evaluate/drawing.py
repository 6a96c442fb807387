"""Images to measure, drawn once: the name of a file says what it was drawn from, so that it is not drawn again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from tqdm import tqdm

from dreamlora.commands.under_test import UnderTest
from dreamlora.files import replacing
from dreamlora.processes import gather_lists, tell_everyone
from dreamlora.sampling.sampler import Asked, SampleItem, SamplePlan, draw_batch


@dataclass(frozen=True)
class Sheet:
    """The images of one LoRA (or of the base model).

    Attributes:
        folder: where they lie.
        plan: what is drawn, and how.
        made_of: everything else that decides an image: model, LoRA, scale, precision, ...; as JSON can say it.
    """

    folder: Path
    plan: SamplePlan
    made_of: Mapping[str, Any]

    def file(self, item: SampleItem) -> Path:
        """Such as ``p00_s42-1a2b3c4d5e6f.png``."""
        return self.folder / self.plan.file_name(item, self.made_of)

    def missing(self) -> list[SampleItem]:
        """The items that have no whole image yet."""
        return [item for item in self.plan.items() if not _whole(self.file(item))]


Job = tuple[int, SampleItem]
"""An image to draw: number of its sheet, and what it shows."""


def share_of(jobs: Sequence[Job], rank: int, world: int) -> dict[int, list[SampleItem]]:
    """What one process draws, by sheet: as much as the others, within one image, whatever is missing where.

    A part of the list, rather than every ``world``-th of it: fewer LoRAs are loaded, and more images fill a batch.
    """
    share: dict[int, list[SampleItem]] = {}
    for number, item in jobs[len(jobs) * rank // world : len(jobs) * (rank + 1) // world]:
        share.setdefault(number, []).append(item)
    return share


def draw_missing(state: PartialState, under_test: UnderTest, sheets: Sequence[Sheet]) -> dict[Path, str]:
    """Draw this process's share of what is missing; the images of all processes that came out wrong, with why."""
    missing: list[Job] = [(number, item) for number, sheet in enumerate(sheets) for item in sheet.missing()]
    # One process says what is missing: for the others it changes as soon as the first one draws.
    share = share_of(tell_everyone(missing), state.process_index, state.num_processes)
    total = sum(map(len, share.values()))
    wrong: list[tuple[Path, str]] = []
    with tqdm(total=total, desc="drawing", unit="image", disable=not (total and state.is_main_process)) as bar:
        for number, items in share.items():
            sheet = sheets[number]
            prompts = [item.prompt for item in items]
            with under_test.drawing(under_test.rows[number], sheet.plan, prompts) as pipeline, under_test.computing():
                for item, problem in draw_sheet(pipeline, sheet, items, under_test.asked(sheet.plan)):
                    bar.update()
                    if problem:
                        wrong.append((sheet.file(item), problem))
    return dict(gather_lists(wrong))


def draw_sheet(
    pipeline: Any, sheet: Sheet, items: Sequence[SampleItem], asked: Asked
) -> Iterator[tuple[SampleItem, str | None]]:
    """Draw images; yields each with what is wrong with it, if anything is. Such an image is not written.

    Args:
        pipeline: with the LoRA.
        sheet: where and how.
        items: of the sheet's plan.
        asked: what is drawn of a prompt.
    """
    size = sheet.plan.at_once
    for start in range(0, len(items), size):
        for drawn in draw_batch(pipeline, sheet.plan, items[start : start + size], asked):
            if not drawn.problem:
                with replacing(sheet.file(drawn.item)) as temporary:
                    drawn.image.save(temporary)
            yield drawn.item, drawn.problem


def _whole(file: Path) -> bool:
    """Whether the file is there; one of length 0 is what a power failure leaves behind."""
    return file.exists() and file.stat().st_size > 0
