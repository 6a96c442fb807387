"""Aspect-ratio buckets: the sizes at which images that are not square are trained.

Every size has about the area of the model's own square, and sides that are multiples of a step. Every image goes to
the size with the nearest aspect ratio, so that little of it is cropped; none is left out, however few share its size.
"""

from __future__ import annotations

import math

Size = tuple[int, int]
"""Width and height in pixels."""

DEFAULT_STEP = 64
WIDEST = 2
"""Sides are at most so many times the resolution and at least its fraction: aspect ratios from 1:4 to 4:1."""


def default_step(resolution: int, multiple: int) -> int:
    """64 pixels, or an eighth of a small resolution; a multiple of ``multiple``."""
    return math.ceil(min(DEFAULT_STEP, resolution // 8) / multiple) * multiple


def bucket_sizes(resolution: int, step: int) -> tuple[Size, ...]:
    """All sizes, sorted: for every width the largest height with an area of at most ``resolution``², and the reverse.

    Args:
        resolution: side of the square, in pixels; the square itself is always among the sizes.
        step: sides are multiples of it.
    """
    lowest, highest = math.ceil(resolution / WIDEST / step) * step, resolution * WIDEST
    sizes = {(resolution, resolution)}
    for side in range(lowest, highest + 1, step):
        other = min(resolution**2 // side // step * step, highest)
        if other >= lowest:
            sizes |= {(side, other), (other, side)}
    return tuple(sorted(sizes))


def nearest(size: Size, sizes: tuple[Size, ...]) -> Size:
    """The one of ``sizes`` whose aspect ratio is nearest, on a logarithmic scale; of equal ones the largest."""
    ratio = math.log(size[0] / size[1])
    return min(sizes, key=lambda s: (round(abs(math.log(s[0] / s[1]) - ratio), 9), -s[0] * s[1]))
