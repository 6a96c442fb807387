"""The losses that verdicts compare: those at the end of the headline runs.

Every run measures a larger set of items at its end (``--final_eval_items``). Where all headline runs have measured the
same one, verdicts are about it, and else about the last point of the curves, whose few items blur differences below a
percent. Items and images are the same for all seeds, so an interval over seeds cannot contain what their choice adds:
``images_se_pct`` tells that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dreamlora.compare.records import Record
from dreamlora.eval_loss.items import ItemLosses


@dataclass(frozen=True)
class Judge:
    """What the end of a run is measured on.

    Attributes:
        evalset_id: of the larger set; None: the last point of the curve.
        items, images: how many it has.
    """

    evalset_id: str | None
    items: int
    images: int

    def base(self, record: Record) -> float:
        """Loss of the base model."""
        return record.at_end.mean(0) if self.evalset_id and record.at_end else record.base

    def final(self, record: Record) -> float:
        """Loss at the end; inf if there is none."""
        if not (record.sound and self.evalset_id and record.at_end):
            return record.final
        loss = record.at_end.mean(record.steps[-1])
        return loss if math.isfinite(loss) else math.inf

    def breakdown(self, record: Record) -> int:
        """0: the training lowered the loss. 1: it ended above the base model's. 2: there is no loss at the end."""
        final = self.final(record)
        return 2 if math.isinf(final) else int(final > self.base(record))

    def images_se_pct(self, ours: Mapping[int, Record], theirs: Mapping[int, Record]) -> float:
        """Standard error, over the images, of the difference in percent of the baseline's loss.

        Losses of an item are first averaged over the seeds; then items of an image, as they are not independent.

        Args:
            ours, theirs: runs by seed; those of the seeds that both have count.

        Returns:
            NaN without the larger set, or with fewer than two images in it.
        """
        seeds = sorted(ours.keys() & theirs.keys())
        if self.evalset_id is None or not seeds or self.images < 2:
            return math.nan
        mine, base = (_items([runs[seed] for seed in seeds]) for runs in (ours, theirs))
        image = _set_of(ours[seeds[0]]).image
        by_image = np.array([(mine - base)[image == number].mean() for number in np.unique(image)])
        return float(100 * by_image.std(ddof=1) / math.sqrt(len(by_image)) / base.mean())


def judge_of(records: Iterable[Record]) -> Judge:
    """What all of these runs, which have a loss at their end, can be judged on."""
    records = list(records)
    sets = [record.at_end for record in records]
    ids = {losses.evalset_id if losses else None for losses in sets}
    if len(ids) == 1 and sets[0] is not None:
        return Judge(sets[0].evalset_id, len(sets[0].image), len(np.unique(sets[0].image)))
    first = records[0] if records else None
    return Judge(None, first.eval_items if first else 0, first.eval_images if first else 0)


def _items(records: Sequence[Record]) -> np.ndarray:
    """Mean over the runs of every item's loss at the end."""
    return np.mean([_set_of(record).rows[record.steps[-1]].astype(np.float64) for record in records], axis=0)


def _set_of(record: Record) -> ItemLosses:
    assert record.at_end is not None
    return record.at_end
