"""DINO: do the images show this very subject? DINO tells things of one kind apart, where CLIP does not."""

from __future__ import annotations

from dreamlora.interfaces import EncoderRole, MetricInputs, Need, Reading
from dreamlora.metrics._similarity import ImageSimilarity, compare_with_references

NAME = "img/dino"
ENCODER: EncoderRole = "dino"
NEEDS: frozenset[Need] = frozenset({"references"})
HIGHER_IS_BETTER = True
SELECTS = True


def compute(inputs: MetricInputs) -> Reading:
    """:func:`~dreamlora.metrics._similarity.image_similarity` of the images of the subject."""
    return compare_with_references(NAME, inputs)


class Dino(ImageSimilarity):
    """DINO as a metric: ``update(generated=..., references=...)`` with vectors of a DINO encoder."""
