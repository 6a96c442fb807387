"""DINO: do the images show this very subject? DINO tells things of one kind apart, where CLIP does not."""

from __future__ import annotations

from dreamlora.interfaces import EncoderRole, MetricInputs, Need, Reading
from dreamlora.metrics._similarity import compare_with_references

NAME = "img/dino"
ABOUT = "DINO: is it this very subject? Likeness to the held-out images; higher is better"
ENCODER: EncoderRole = "dino"
NEEDS: frozenset[Need] = frozenset({"references"})
HIGHER_IS_BETTER = True
SELECTS = True
COMPARES_SETS = False


def compute(inputs: MetricInputs) -> Reading:
    """:func:`~dreamlora.metrics._similarity.image_similarity` of the images of the subject."""
    return compare_with_references(inputs)
