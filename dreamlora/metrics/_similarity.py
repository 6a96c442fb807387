"""Similarity of generated images to real ones, whatever the encoder (clip_i and dino differ in nothing else)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dreamlora.interfaces import MetricInputs, Reading
from dreamlora.metrics._vectors import cosines, need, of_subject

if TYPE_CHECKING:
    from torch import Tensor


def image_similarity(generated: Tensor, references: Tensor) -> float:
    """Mean cosine over all pairs of a generated and a real image, in [-1, 1] (Ruiz et al. 2022, arXiv 2208.12242, §4).

    An image is not compared with itself: pairs with exactly equal vectors are left out.

    Args:
        generated: ``[n, d]``.
        references: ``[r, d]``.

    Raises:
        ValueError: there is no pair, or a vector is zero or not finite.
    """
    import torch

    need("an image similarity", 1, len(generated), len(references))
    similar = cosines(generated, references)
    other = torch.ones_like(similar, dtype=torch.bool)
    for i, j in (similar > 1 - 1e-6).nonzero().tolist():
        other[i, j] = not torch.equal(generated[i], references[j])
    if not other.any():
        raise ValueError("an image similarity needs images that differ from the references")
    return float(similar[other].mean())


def compare_with_references(inputs: MetricInputs) -> Reading:
    """The images whose prompts name the subject, against the references."""
    assert inputs.references is not None
    images = of_subject(inputs)
    return Reading(image_similarity(images, inputs.references), len(images), len(inputs.references))
