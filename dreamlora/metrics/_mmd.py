"""Maximum mean discrepancy of two samples: the unbiased estimate, and what chance alone would give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from dreamlora.metric_names import COPIES, P_VALUE
from dreamlora.metrics._vectors import exact

if TYPE_CHECKING:
    from torch import Tensor

Kernel: TypeAlias = "Callable[[Tensor, Tensor], Tensor]"
"""Rows ``[n, d]`` and ``[m, d]`` float64 to kernel values ``[n, m]``."""

PERMUTATIONS = 999
MEMORISED_BELOW = 0.01
BLOCK_BYTES = 2**26


@dataclass(frozen=True)
class Discrepancy:
    """An unbiased MMD² with its permutation test.

    Attributes:
        value: may be negative: its mean is 0 for two samples of one distribution.
        p: how often a random split of the pooled images is at least as far apart; small: the two sets differ.
        p_closer: how often it is at least as close; small: images of one set repeat the other's.
    """

    value: float
    p: float
    p_closer: float

    @property
    def memorised(self) -> bool:
        """Whether the sets are closer than two samples of one distribution would be: one holds copies of the other."""
        return self.value < 0 and self.p_closer <= MEMORISED_BELOW

    @property
    def parts(self) -> Mapping[str, float]:
        """What a metric says besides the value."""
        return {P_VALUE: self.p, COPIES: float(self.memorised)}


def mmd(first: Tensor, second: Tensor, kernel: Kernel, permutations: int = PERMUTATIONS, seed: int = 0) -> Discrepancy:
    """Unbiased MMD² (U-statistic; Gretton et al. 2012, JMLR 13, eq. 3) and permutation p-values.

    The order of the rows does not matter, so processes that gather in another order get the same p. Kernel values are
    never held all at once: memory grows with ``(n + m) * permutations``.

    Args:
        first: ``[n, d]``, n >= 2.
        second: ``[m, d]``, m >= 2.
        kernel: symmetric and positive definite.
        permutations: random splits; the smallest possible p is 1 / (permutations + 1).
        seed: of the splits; torch's random state is not touched.

    Raises:
        ValueError: a value is not finite.
    """
    import torch

    pooled = torch.cat([_sorted(exact(first)), _sorted(exact(second))])
    n, m = len(first), len(second)
    splits = _splits(n, m, permutations, seed)
    total = diagonal = 0.0
    inside = torch.zeros(len(splits), dtype=torch.float64)  # sum of k(x, y) over x, y of the first side, by split
    inside_diagonal = torch.zeros_like(inside)
    across = torch.zeros_like(inside)  # ... over x of the first side and y of both
    block = max(1, BLOCK_BYTES // (8 * len(pooled)))
    for start in range(0, len(pooled), block):
        rows = slice(start, start + block)
        values = kernel(pooled[rows], pooled)
        own = values.diagonal(offset=start)
        chosen = splits[:, rows]
        inside += ((splits @ values.T) * chosen).sum(1)
        inside_diagonal += chosen @ own
        across += chosen @ values.sum(1)
        total += float(values.sum())
        diagonal += float(own.sum())
    between = across - inside
    outside = total - 2 * across + inside
    first_mean = (inside - inside_diagonal) / (n * (n - 1))
    second_mean = (outside - (diagonal - inside_diagonal)) / (m * (m - 1))
    estimates = first_mean + second_mean - 2 * between / (n * m)
    observed, drawn = estimates[0], estimates[1:]
    slack = 1e-12 * (first_mean[0].abs() + second_mean[0].abs())  # a split that equals the observed one counts as equal
    further = int((drawn >= observed - slack).sum())
    closer = int((drawn <= observed + slack).sum())
    return Discrepancy(float(observed), (1 + further) / (permutations + 1), (1 + closer) / (permutations + 1))


def _sorted(rows: Tensor) -> Tensor:
    keys = [row.tobytes() for row in rows.contiguous().numpy()]
    return rows[sorted(range(len(keys)), key=keys.__getitem__)]


def _splits(n: int, m: int, permutations: int, seed: int) -> Tensor:
    """``[1 + permutations, n + m]`` float64, 1 where an image is on the first side; row 0 is the observed split."""
    import torch

    random = np.random.default_rng(seed)
    splits = np.zeros((1 + permutations, n + m))
    splits[0, :n] = 1
    for row in splits[1:]:
        row[random.permutation(n + m)[:n]] = 1
    return torch.from_numpy(splits)
