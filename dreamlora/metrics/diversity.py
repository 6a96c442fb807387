"""Diversity: do the images of one prompt differ, or is it one picture again and again?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dreamlora.interfaces import EncoderRole, MetricInputs, Need, Reading
from dreamlora.metrics._vectors import cosines

if TYPE_CHECKING:
    from torch import Tensor

NAME = "img/div"
ABOUT = "Diversity of the images of one prompt. Higher is better"
ENCODER: EncoderRole = "dino"
NEEDS: frozenset[Need] = frozenset()
HIGHER_IS_BETTER = True
SELECTS = True
COMPARES_SETS = False


def diversity(generated: Tensor, groups: Tensor) -> float:
    """1 minus the mean cosine of two different images of a prompt, averaged over prompts; 0: all the same.

    Args:
        generated: ``[n, d]``.
        groups: ``[n]``, number of each image's prompt; prompts with a single image are left out.

    Raises:
        ValueError: no prompt has two images.
    """
    import torch

    similar = []
    for group in groups.unique():
        members = generated[groups == group]
        count = len(members)
        if count > 1:
            among = cosines(members, members)
            similar.append((among.sum() - among.trace()) / (count * (count - 1)))
    if not similar:
        raise ValueError("diversity needs two images of a prompt: give --num_images_per_prompt 2 or more")
    return float(1 - torch.stack(similar).mean())


def compute(inputs: MetricInputs) -> Reading:
    """Of all prompts with at least two images."""
    _, counts = inputs.groups.unique(return_counts=True)
    return Reading(diversity(inputs.generated, inputs.groups), int(counts[counts > 1].sum()))
