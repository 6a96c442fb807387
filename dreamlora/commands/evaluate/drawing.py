"""Images to measure, drawn once: the name of a file says what it was drawn from, so that it is not drawn again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamlora.runfolder import replacing
from dreamlora.sampling.sampler import SampleItem, SamplePlan, draw_batch


@dataclass(frozen=True)
class Sheet:
    """The images of one LoRA (or of the base model).

    Attributes:
        folder: where they lie.
        plan: what is drawn, and how.
        made_of: everything else that decides an image: model, LoRA, scale, precision; as JSON can say it.
    """

    folder: Path
    plan: SamplePlan
    made_of: Mapping[str, Any]

    def file(self, item: SampleItem) -> Path:
        """Such as ``p00_s42-1a2b3c4d5e6f.png``."""
        plan = self.plan
        how = [plan.num_inference_steps, plan.guidance_scale, plan.negative_prompt, plan.width, plan.height]
        text = json.dumps([dict(self.made_of), how, item.prompt, item.seed], sort_keys=True)
        return self.folder / f"{item.name}-{hashlib.sha256(text.encode()).hexdigest()[:12]}.png"

    def missing(self, rank: int = 0, world: int = 1) -> list[SampleItem]:
        """Those of this process's share (every ``world``-th image) that are not there."""
        return [item for item in self.plan.items()[rank::world] if not _whole(self.file(item))]


def draw_sheet(
    pipeline: Any, sheet: Sheet, items: Sequence[SampleItem], done: Callable[[int], object]
) -> Iterator[tuple[SampleItem, str]]:
    """Draw and write images; yields those that came out wrong, with the problem. Those are not written.

    Args:
        pipeline: with the LoRA.
        sheet: where and how.
        items: of the sheet's plan.
        done: called with the number of images just drawn.
    """
    size = sheet.plan.batch_size
    for start in range(0, len(items), size):
        batch = items[start : start + size]
        for drawn in draw_batch(pipeline, sheet.plan, batch):
            if drawn.problem:
                yield drawn.item, drawn.problem
                continue
            with replacing(sheet.file(drawn.item)) as temporary:
                drawn.image.save(temporary)
        done(len(batch))


def _whole(file: Path) -> bool:
    """Whether the file is there; one of length 0 is what a power failure leaves behind."""
    return file.exists() and file.stat().st_size > 0
