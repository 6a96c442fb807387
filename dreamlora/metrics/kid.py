"""KID: do generated and real images look drawn from one source? Unbiased at any number of images."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dreamlora.interfaces import EncoderRole, MetricInputs, Need, Reading
from dreamlora.metrics._mmd import PERMUTATIONS, Discrepancy, mmd
from dreamlora.metrics._vectors import need, of_subject

if TYPE_CHECKING:
    from torch import Tensor

NAME = "img/kid"
ABOUT = "KID: distance of generated and held-out images as sets. Lower is better; about 0: no difference"
ENCODER: EncoderRole = "features"
NEEDS: frozenset[Need] = frozenset({"references"})
HIGHER_IS_BETTER = False
SELECTS = True
COMPARES_SETS = True


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
    images = of_subject(inputs)
    discrepancy = kid(images, inputs.references)
    return Reading(discrepancy.value, len(images), len(inputs.references), discrepancy.parts)
