"""Copies: are the images closer to a training photo than an unseen photo of the subject is?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dreamlora.interfaces import EncoderRole, MetricInputs, Need, Reading
from dreamlora.metrics._vectors import cosines, need, of_subject

if TYPE_CHECKING:
    from torch import Tensor

NAME = "img/copy"
ABOUT = "Copies: above 0, images are closer to a training image than real ones are"
ENCODER: EncoderRole = "dino"
NEEDS: frozenset[Need] = frozenset({"references", "training"})
HIGHER_IS_BETTER = False
SELECTS = True
COMPARES_SETS = False


def copy_score(generated: Tensor, training: Tensor, references: Tensor) -> float:
    """Mean cosine to the nearest training image: that of generated images minus that of real, unseen ones.

    Above 0, the model gives the photos it was shown rather than the subject. Real photos are the measure because photos
    of one subject resemble each other anyway.

    Args:
        generated: ``[n, d]``.
        training: ``[m, d]``.
        references: ``[r, d]``, not among ``training``.

    Raises:
        ValueError: a set is empty, or a vector is zero or not finite.
    """
    need("copy", 1, len(generated), len(training), len(references))

    def nearest(images: Tensor) -> Tensor:
        return cosines(images, training).max(1).values.mean()

    return float(nearest(generated) - nearest(references))


def compute(inputs: MetricInputs) -> Reading:
    """Of the images whose prompts name the subject."""
    assert inputs.training is not None and inputs.references is not None
    images = of_subject(inputs)
    return Reading(copy_score(images, inputs.training, inputs.references), len(images), len(inputs.training))
