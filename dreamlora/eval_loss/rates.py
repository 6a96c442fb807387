"""Which learning rate to train with, from a few short runs: pure functions of their losses. Needs no torch.

Every short run begins where the run itself will begin, sees the same samples, and ends with a measurement of the same
items, so that their losses differ by the rate alone. What the classic range test does in one sweep (arXiv 1506.01186),
where every rate inherits what the ones before it have done, is done here by runs of their own.

The best rate of a short run is higher than that of a long one: fewer steps have to go as far, and what a high rate
breaks has not broken yet. The proposal is therefore the best rate of the short runs divided by a power of how much
longer the run is; ``benchmarks/auto_rate.py`` measures that power.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dreamlora.eval_loss.items import Difference, paired_difference
from dreamlora.eval_loss.selection import difference_text
from dreamlora.figures import loss, rate

SCHEMA_VERSION = 1
RATIO = 2.0
"""Between the rates around the best one; the search for it takes two such steps at a time."""
MOST = 10
"""Short runs at most: the search goes that far from where it began, a factor of 4 to 4^8."""
USUAL = 5
"""... and as many where the best rate is near."""
SHARE = 0.01
"""Of the training, that a test takes where that is enough for ``LEAST_STEPS``."""
LEAST_STEPS = 12
"""Of a short run: with fewer the lowest loss is a matter of chance."""
ITEMS = 32
"""Measured after each: paired, half of the curve's tell as much."""
EXPONENT = 1 / 3
"""A run of 8 times the steps gets half the rate."""
CLEAR = 2.0
"""Paired standard errors that the best short run must lie below the start."""


def steps_of(per_step: float, total: int, items: int) -> int:
    """Steps of each short run.

    Args:
        per_step: forward-equivalents of a step of training.
        total: steps of the run itself.
        items: that are measured after each.
    """
    affordable = (SHARE * per_step * total / USUAL - items) / per_step
    return min(total, max(LEAST_STEPS, int(affordable)))


def next_power(losses: Mapping[int, float]) -> int | None:
    """Which rate to try next, as a power of ``RATIO`` times the first one; None: the best is known.

    Two steps at a time towards lower losses, until one is higher; then one step to either side of the lowest.

    Args:
        losses: by power; one that is not finite is of a run that broke off.
    """
    if 0 not in losses:
        return 0
    if len(losses) >= MOST:
        return None
    if 2 not in losses:
        return 2
    best = lowest(losses)
    if best == max(losses):
        return best + 2
    if best == min(losses):
        return best - 2
    return next((power for power in (best + 1, best - 1) if power not in losses), None)


def lowest(losses: Mapping[int, float]) -> int:
    """The power with the lowest loss; the smallest of all where no run held."""
    return min(sorted(losses), key=lambda power: losses[power] if math.isfinite(losses[power]) else math.inf)


def vertex(losses: Mapping[int, float]) -> float:
    """Where between its neighbours the lowest loss lies, as a power: of the parabola through the three.

    Where there are not three, or one of them broke off, it is the lowest itself.
    """
    best = lowest(losses)
    low, middle, high = (losses.get(power, math.inf) for power in (best - 1, best, best + 1))
    bend = low - 2 * middle + high
    return best + (low - high) / (2 * bend) if math.isfinite(bend) and bend > 0 else float(best)


@dataclass(frozen=True)
class RangeTest:
    """The short runs of a test.

    Attributes:
        own: the rate of a run without a test. The search begins where it would be the best of a run of ``total`` steps.
        steps: of each of them.
        total: of the run itself, as if all of its steps had the highest rate of its schedule.
        start: ``[items]`` losses before the first step.
        items: ``[items]`` losses by power of ``RATIO``, in the order in which they were tried; None: the run broke off.
    """

    own: float
    steps: int
    total: float
    start: np.ndarray
    items: Mapping[int, np.ndarray | None]

    @property
    def losses(self) -> dict[int, float]:
        """Means of the items by power."""
        return {k: math.inf if row is None else float(np.mean(row, dtype=np.float64)) for k, row in self.items.items()}

    def rate(self, power: float) -> float:
        """What a power stands for, to three digits."""
        return float(f"{self.own * self.shortening * RATIO**power:.3g}")

    def against_start(self, power: int) -> Difference | None:
        """How the losses at a rate differ from those before the first step; None: the run broke off."""
        row = self.items[power]
        return None if row is None else paired_difference(row, self.start)

    @property
    def shortening(self) -> float:
        """What the best rate of the short runs is divided by."""
        return max(1.0, self.total / self.steps) ** EXPONENT

    @property
    def learns(self) -> bool:
        """Whether the best of the short runs has clearly learnt something."""
        apart = self.against_start(lowest(self.losses))
        return apart is not None and math.isfinite(apart.mean) and apart.mean < -CLEAR * apart.se

    @property
    def edge(self) -> str:
        """At which end of the rates tried the lowest loss lies: "lowest", "highest"; empty: at none."""
        best = lowest(self.losses)
        return "lowest" if best == min(self.items) else "highest" if best == max(self.items) else ""

    def proposal(self) -> float:
        """The rate to train with; where nothing was learnt, that of a run without a test."""
        return self.rate(vertex(self.losses) - math.log(self.shortening, RATIO)) if self.learns else self.own

    def reason(self, metric: str) -> str:
        """Why, in a few sentences.

        Args:
            metric: that was measured.
        """
        losses = self.losses
        best = lowest(losses)
        apart = self.against_start(best)
        tried = f"{len(losses)} runs of {self.steps} steps at rates from {self._span}"
        if apart is None or not self.learns:
            return (
                f"The test cannot tell: none of {tried} has clearly lowered {metric} ({loss(self.start.mean())} before "
                f"the first step), so the run has {rate(self.own)}, which it would have without a test."
            )
        broke = [self.rate(power) for power in sorted(losses) if not math.isfinite(losses[power])]
        sentences = [
            f"Of {tried}, {metric} on {len(self.start)} items fell furthest at {rate(self.rate(best))}: to "
            f"{loss(losses[best])} from {loss(self.start.mean())}, {difference_text(apart)}."
        ]
        if broke:
            sentences.append(f"{' and '.join(map(rate, broke))} diverged.")
        if self.edge:
            sentences.append(f"That is the {self.edge} rate that was tried: a better one may lie beyond.")
        sentences.append(
            f"Their best lies at {rate(self.rate(vertex(losses)))}; a run {self.total / self.steps:.3g} times as long "
            f"wants a rate {self.shortening:.2g} times lower: {rate(self.proposal())}."
            if self.shortening > 1
            else f"Their best, and the run's, lies at {rate(self.proposal())}."
        )
        return " ".join(sentences)

    @property
    def _span(self) -> str:
        rates = [self.rate(power) for power in self.items]
        return f"{rate(min(rates))} to {rate(max(rates))}"

    def facts(self, metric: str, evalset_id: str) -> dict[str, Any]:
        """What the run's record of the test holds.

        Args:
            metric: that was measured.
            evalset_id: of its items.
        """
        return {
            "schema_version": SCHEMA_VERSION,
            "learning_rate": self.proposal(),
            "reason": self.reason(metric),
            "metric": metric,
            "evalset_id": evalset_id,
            "n": len(self.start),
            "steps": self.steps,
            "length": self.total,
            "exponent": EXPONENT,
            "start": float(self.start.mean(dtype=np.float64)),
            "tried": [self._row(power) for power in sorted(self.items)],
        }

    def _row(self, power: int) -> dict[str, Any]:
        value, apart = self.losses[power], self.against_start(power)
        finite = apart is not None and math.isfinite(value)
        return {
            "learning_rate": self.rate(power),
            "value": value if finite else None,
            "difference": apart.mean if apart is not None and finite else None,
            "standard_error": apart.se if apart is not None and finite else None,
        }
