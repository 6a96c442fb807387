"""Scores over cells, and how sure they are. No torch.

The score of a method that ends at the loss L in a cell is

    (L_base - L) / (L_base - L_best),

1 for the best that is known, 0 for nothing learnt. L is the mean over the seeds; L_best the lowest such mean of any
method, frozen or tuned in that cell.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from _robustness import Cell, Config, Method

from dreamlora.compare.schema import Word
from dreamlora.compare.stats import CONFIDENCE, MIN_SEEDS, TInterval, paired_delta, paired_verdict, t_quantile, verdict

MOST_DRAWS = 5**5
"""Up to five seeds, all ways to draw them with replacement; else so many at random."""


@dataclass(frozen=True)
class Tested:
    """Final losses of the test.

    Attributes:
        base: loss of the base model by cell.
        losses: by cell and what ran there, one per seed, the same seeds everywhere; infinite if a training broke off.
        frozen: what every method is judged by.
    """

    base: Mapping[Cell, float]
    losses: Mapping[Cell, Mapping[Config, Sequence[float]]]
    frozen: Mapping[Method, Config]

    @property
    def seeds(self) -> int:
        """How many there are."""
        return len(next(iter(next(iter(self.losses.values())).values())))


def draws(seeds: int) -> np.ndarray:
    """``[draws, seeds]``: seeds drawn with replacement; the same for all methods and cells, whose seeds are paired."""
    if seeds**seeds <= MOST_DRAWS:
        return np.array(list(itertools.product(range(seeds), repeat=seeds)))
    return np.random.default_rng(0).integers(seeds, size=(MOST_DRAWS, seeds))


def cell_scores(tested: Tested, method: Method, drawn: np.ndarray, others_only: bool = False) -> np.ndarray:
    """``[cells, draws]``; minus infinity where a training broke off.

    Args:
        drawn: ``[draws, seeds]``.
        others_only: whether L_best is that of the other methods: a score above 1 is better than all of them.
    """
    rows = []
    for cell, losses in tested.losses.items():
        means = {config: np.asarray(values)[drawn].mean(axis=1) for config, values in losses.items()}
        counted = [value for config, value in means.items() if not (others_only and config.method == method)]
        best = np.min(counted, axis=0) if counted else means[tested.frozen[method]]
        rows.append((tested.base[cell] - means[tested.frozen[method]]) / (tested.base[cell] - best))
    return np.array(rows)


def point_scores(tested: Tested, method: Method, others_only: bool = False) -> dict[Cell, float]:
    """Of all seeds as they are."""
    as_they_are = np.arange(tested.seeds)[None]
    return dict(zip(tested.losses, cell_scores(tested, method, as_they_are, others_only)[:, 0].tolist(), strict=True))


def worst_interval(tested: Tested, method: Method, others_only: bool = False) -> tuple[float, float]:
    """Of the worst cell: seeds are drawn anew and all is computed from them, L_best and which cell is the worst too."""
    if tested.seeds < MIN_SEEDS:
        return math.nan, math.nan
    return percentiles(cell_scores(tested, method, draws(tested.seeds), others_only).min(axis=0), tested.seeds)


def worst_difference(tested: Tested, method: Method, other: Method) -> TInterval:
    """Worst cell of the one minus worst cell of the other (which may be another cell); positive is better."""

    def apart(drawn: np.ndarray) -> np.ndarray:
        mine, theirs = (cell_scores(tested, one, drawn).min(axis=0) for one in (method, other))
        with np.errstate(invalid="ignore"):  # both broke off
            return np.nan_to_num(mine - theirs, nan=0.0, posinf=math.inf, neginf=-math.inf)

    mean = float(apart(np.arange(tested.seeds)[None])[0])
    if tested.seeds < MIN_SEEDS:
        return TInterval(mean, math.nan, math.nan, tested.seeds)
    return TInterval(mean, *percentiles(apart(draws(tested.seeds)), tested.seeds), tested.seeds)


def worst_word(difference: TInterval) -> Word:
    """In the words of ``dreamlora compare``: equivalent within a hundredth of the score."""
    points = (100 * value for value in (-difference.mean, -difference.high, -difference.low))
    return verdict(TInterval(*points, difference.n))


def percentiles(values: np.ndarray, seeds: int) -> tuple[float, float]:
    """The expanded percentile interval (Hesterberg 2015): the plain one is too narrow for few seeds, as it takes the
    normal distribution's quantile for Student's, and n for n - 1."""
    tail = NormalDist().cdf(-math.sqrt(seeds / (seeds - 1)) * t_quantile((1 + CONFIDENCE) / 2, seeds - 1))
    low, high = np.quantile(values, [tail, 1 - tail], method="inverted_cdf")
    return float(low), float(high)


@dataclass(frozen=True)
class Against:
    """A method against another, paired by seed, as ``dreamlora compare`` does it.

    Attributes:
        pct: of the geometric mean, over the cells, of the loss at the end.
        word: about that.
        cells: how many cells each word is said of.
    """

    pct: TInterval
    word: Word
    cells: Mapping[Word, int]


def against(tested: Tested, method: Method, other: Method) -> Against:
    """Failing in one cell is failing: a seed in which a training broke off has no mean."""
    mine, theirs = (
        np.array([losses[tested.frozen[one]] for losses in tested.losses.values()]) for one in (method, other)
    )
    base = np.array([tested.base[cell] for cell in tested.losses])[:, None]
    words: list[Word] = [_word(m, t, b)[1] for m, t, b in zip(mine, theirs, base, strict=True)]
    pct, word = _word(mine, theirs, base)
    return Against(pct, word, {one: words.count(one) for one in sorted(set(words))})


def _word(mine: np.ndarray, theirs: np.ndarray, base: np.ndarray) -> tuple[TInterval, Word]:
    """``[cells, seeds]`` or ``[seeds]``."""
    mine, theirs = np.atleast_2d(mine), np.atleast_2d(theirs)
    means = (np.exp(np.log(losses).mean(axis=0)).tolist() for losses in (mine, theirs))
    delta = paired_delta(*means)
    broke = [np.where(np.isinf(losses), 2, losses > base).max(axis=0) for losses in (mine, theirs)]
    return delta.pct, paired_verdict(delta, np.sign(broke[0] - broke[1]).astype(int).tolist())


def vertex(losses: Mapping[float, float]) -> float:
    """The rate where the parabola through the lowest loss and its two neighbours, over ln(rate), is lowest; the lowest
    one's own rate at the end of a grid or beside a training that broke off."""
    rates = sorted(losses)
    at = min(range(len(rates)), key=lambda k: losses[rates[k]])
    around = rates[at - 1 : at + 2] if at else []
    if len(around) < 3 or not all(math.isfinite(losses[rate]) for rate in around):
        return rates[at]
    square, slope, _ = np.polyfit(np.log(around) - math.log(rates[at]), [losses[rate] for rate in around], 2)
    return rates[at] * math.exp(-slope / (2 * square)) if square > 0 else rates[at]
