"""CLIP-I: do the images look like the real ones, in CLIP's eyes?"""

from __future__ import annotations

from dreamlora.interfaces import EncoderRole, MetricInputs, Need, Reading
from dreamlora.metrics._similarity import compare_with_references

NAME = "img/clip_i"
ABOUT = "CLIP-I: likeness to the held-out images. Higher is better"
ENCODER: EncoderRole = "clip"
NEEDS: frozenset[Need] = frozenset({"references"})
HIGHER_IS_BETTER = True
SELECTS = True
COMPARES_SETS = False


def compute(inputs: MetricInputs) -> Reading:
    """:func:`~dreamlora.metrics._similarity.image_similarity` of the images of the subject."""
    return compare_with_references(inputs)
