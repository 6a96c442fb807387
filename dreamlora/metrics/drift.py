"""Drift: how far has the base model moved where it should not have, on prompts without the subject?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dreamlora.interfaces import EncoderRole, MetricInputs, Need, Reading
from dreamlora.metrics._vectors import need, paired_cosines

if TYPE_CHECKING:
    from torch import Tensor

NAME = "img/drift"
ABOUT = "Drift of the images of prompts without the subject. Lower is better"
ENCODER: EncoderRole = "clip"
NEEDS: frozenset[Need] = frozenset({"base"})
HIGHER_IS_BETTER = False
SELECTS = True
COMPARES_SETS = False


def drift(generated: Tensor, base: Tensor) -> float:
    """Mean of 1 minus the cosine of two images of one prompt and one seed, with and without the LoRA; 0: unmoved.

    Args:
        generated: ``[n, d]``.
        base: ``[n, d]``, the base model's.

    Raises:
        ValueError: there is no image, or a vector is zero or not finite.
    """
    need("drift", 1, len(generated))
    return float(1 - paired_cosines(generated, base).mean())


def compute(inputs: MetricInputs) -> Reading:
    """Of the images whose prompts do not name the subject."""
    assert inputs.base is not None
    others = ~inputs.with_subject
    if not others.any():
        raise ValueError("drift needs a prompt without the subject, such as the class prompt")
    moved, unmoved = inputs.generated[others], inputs.base[others]
    return Reading(drift(moved, unmoved), len(moved), len(unmoved))
