"""KID: do generated and real images look drawn from one source? Unbiased at any number of images."""

from __future__ import annotations

import torch
from torch import Tensor

from dreamlora.interfaces import EncoderRole, MetricInputs, Need, Reading
from dreamlora.metrics._mmd import PERMUTATIONS, Discrepancy, mmd
from dreamlora.metrics._stateful import EmbeddingMetric
from dreamlora.metrics._vectors import need, of_subject

NAME = "img/kid"
ENCODER: EncoderRole = "features"
NEEDS: frozenset[Need] = frozenset({"references"})
HIGHER_IS_BETTER = False
SELECTS = True


def kid(first: Tensor, second: Tensor, permutations: int = PERMUTATIONS, seed: int = 0) -> Discrepancy:
    """Unbiased MMD² with the kernel ``(x·y / d + 1)³`` over the full sets (Binkowski et al. 2018, arXiv 1801.01401).

    Args:
        first: ``[n, d]``.
        second: ``[m, d]``.
        permutations: of the test.
        seed: of the permutations.

    Raises:
        ValueError: fewer than two images on a side.
    """
    need("kid", 2, len(first), len(second))
    return mmd(first, second, lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3, permutations, seed)


def compute(inputs: MetricInputs) -> Reading:
    """Of the images whose prompts name the subject, with the test's p-value and whether it is an alarm of copies."""
    assert inputs.references is not None
    shown = of_subject(inputs)
    found = kid(shown, inputs.references)
    values = {NAME: found.value, f"{NAME}_p": found.p, f"{NAME}_negative": float(found.memorised)}
    return Reading(values, len(shown), len(inputs.references))


class Kid(EmbeddingMetric):
    """:func:`kid` as a metric: ``update(generated=..., references=...)``."""

    SIDES = ("generated", "references")
    higher_is_better = False

    def compute(self) -> Tensor:
        """The value; for its p-value call :func:`kid`."""
        return torch.tensor(kid(self.rows("generated"), self.rows("references"), 0).value, dtype=torch.float64)
