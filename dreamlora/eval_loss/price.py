"""How many items the evaluation has, what they cost in forward passes, and how much of that a run can afford. No torch.

The items of one set are the same in every run, long or short, since runs that measured different items cannot be
compared item by item. So a run that cannot afford the full evaluation measures less often, and takes a larger set of
fewer items at its end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

CURVE_ITEMS = 64
MIN_TIMES = 4
"""Times per image, at least. They are shifted from image to image, so that 16 images cover 64 times together."""
FINAL_NOISES = 2
"""Noises per image and time in the larger set, where it has room for that."""

LARGEST_SHARE = 0.1
"""Of the training's forward-equivalents that the evaluation takes unless it is told how often to measure what."""
MOST_OCCASIONS, LEAST_OCCASIONS = 20, 5
"""Measurements of the curve after the base model's. With fewer than five, the best checkpoint is a guess."""
FINAL_SIZES = (256, 128, 96)
"""Items of the larger set, more than the curve has. A comparison takes the first, whatever it costs: its verdicts rest
on it."""
FINAL_MEASUREMENTS = 3
"""Of the larger set: base model, best checkpoint, last step."""

FORWARD_AND_BACKWARD = 2
"""Forward-equivalents of a trained sample: the backward pass through frozen weights makes the gradients of activations
alone, which is one product per layer, as the forward pass is."""
RECOMPUTATION = 1
"""More of them under gradient checkpointing."""


def curve_times(images: int) -> int:
    """Times per image in the set of the curve: about 64 items in all."""
    return max(MIN_TIMES, math.ceil(CURVE_ITEMS / images))


def final_design(images: int, items: int) -> tuple[int, int]:
    """Times per image and noises per time in a larger set of at least ``items``."""
    noises = FINAL_NOISES if items >= images * MIN_TIMES * FINAL_NOISES else 1
    return max(MIN_TIMES, math.ceil(items / (images * noises))), noises


@dataclass(frozen=True)
class Price:
    """What the evaluation of a run costs.

    Attributes:
        training: forward-equivalents of the training.
        occasions: measurements of the curve, the base model's included.
        curve_items: forward passes of one of them.
        final_items: forward passes of one measurement of the larger set; 0: it is not measured.
        gap_items: of the training images, which are measured beside it.
        raw_occasions: more measurements of the curve, of the weights without their moving average.
    """

    training: int
    occasions: int
    curve_items: int
    final_items: int
    gap_items: int
    raw_occasions: int = 0

    @property
    def forwards(self) -> int:
        """All forward passes of the evaluation, of single items."""
        at_end = FINAL_MEASUREMENTS * (self.final_items + self.gap_items) if self.final_items else 0
        return (self.occasions + self.raw_occasions) * self.curve_items + at_end

    @property
    def share(self) -> float:
        """Of the training's forward-equivalents."""
        return self.forwards / self.training

    def __str__(self) -> str:
        text = f"The evaluation loss is measured {self.occasions} times"
        if self.raw_occasions:
            text += f" (and {self.raw_occasions} times without the moving average)"
        text += f" on {self.curve_items} items"
        if self.final_items:
            text += f" and {FINAL_MEASUREMENTS} times on {self.final_items + self.gap_items}"
        return f"{text}: {self.forwards:,} forward passes, {self.share:.0%} of what the training costs."


@dataclass(frozen=True)
class Workload:
    """A run's size, as far as the price of its evaluation depends on it.

    Attributes:
        steps: optimizer steps.
        samples_per_step: of all processes, class images included.
        images: that are measured on.
        gap_images: training images that are measured beside the larger set; 0: none.
        checkpointing: whether activations are recomputed in the backward pass.
        averaged: whether there is a moving average, so that everything but the base model is measured with and without.
    """

    steps: int
    samples_per_step: int
    images: int
    gap_images: int
    checkpointing: bool
    averaged: bool = False

    @property
    def training(self) -> int:
        """Forward-equivalents of the training."""
        each = FORWARD_AND_BACKWARD + (RECOMPUTATION if self.checkpointing else 0)
        return self.steps * self.samples_per_step * each

    def price(self, every: int, final_items: int) -> Price:
        """What it costs to measure every so many steps (0: never), and a larger set of at least so many items."""
        if not every:
            return Price(self.training, 0, 0, 0, 0)
        later = math.ceil(self.steps / every)
        final = self.images * math.prod(final_design(self.images, final_items)) if final_items else 0
        gap = _curve_items(self.gap_images) if final_items and self.gap_images else 0
        raw = later if self.averaged else 0
        return Price(self.training, 1 + later, _curve_items(self.images), final, gap, raw)


def affordable(work: Workload, every: int | None, final_items: int | None, least_every: int) -> tuple[int, int]:
    """Steps between measurements, and items of the larger set, for what was left open (None).

    The larger set gets at most half of what the evaluation may cost, less where the curve needs more, and is the
    largest of ``FINAL_SIZES`` that fits; the curve gets the rest. Neither gets less than a verdict needs, whatever that
    costs.

    Args:
        work: the run.
        every, final_items: what was decided.
        least_every: so many steps lie between two measurements, at least.
    """
    allowed = LARGEST_SHARE * work.training
    ends_alone = work.price(work.steps, 0).forwards
    if final_items is None:
        prices = {items: work.price(work.steps, items).forwards - ends_alone for items in FINAL_SIZES}
        needed = 0 if every is not None else work.price(math.ceil(work.steps / LEAST_OCCASIONS), 0).forwards
        room = min(allowed / 2, allowed - needed)
        final_items = next((items for items in FINAL_SIZES if prices[items] <= room), FINAL_SIZES[-1])
    if every is None:
        ends = work.price(work.steps, final_items)
        each = ends.curve_items * (2 if work.averaged else 1)
        between = int((allowed - ends.forwards) // each)
        occasions = min(MOST_OCCASIONS, max(LEAST_OCCASIONS, 1 + between))
        every = max(least_every, math.ceil(work.steps / occasions))
    return every, final_items


def _curve_items(images: int) -> int:
    return images * curve_times(images)
