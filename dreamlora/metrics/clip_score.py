"""CLIP-T: does the image show what its prompt says?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dreamlora.interfaces import EncoderRole, MetricInputs, Need, Reading
from dreamlora.metrics._vectors import need, paired_cosines

if TYPE_CHECKING:
    from torch import Tensor

NAME = "img/clip_t"
ABOUT = "CLIP-T: does the image show its prompt? Higher is better"
ENCODER: EncoderRole = "clip"
NEEDS: frozenset[Need] = frozenset({"prompts"})
HIGHER_IS_BETTER = True
SELECTS = True
COMPARES_SETS = False


def clip_score(images: Tensor, texts: Tensor) -> float:
    """Mean cosine of image i and text i, in [-1, 1]: neither times 100 nor 2.5, and not cut off at 0.

    Hessel et al. 2021, arXiv 2104.08718, without the factor and the cut-off of their eq. 1.

    Args:
        images: ``[n, d]``.
        texts: ``[n, d]``.

    Raises:
        ValueError: there is no image, or a vector is zero or not finite.
    """
    need("clip_score", 1, len(images))
    return float(paired_cosines(images, texts).mean())


def compute(inputs: MetricInputs) -> Reading:
    """Of all generated images, whatever their prompts."""
    assert inputs.prompts is not None
    return Reading(clip_score(inputs.generated, inputs.prompts), len(inputs.generated))
