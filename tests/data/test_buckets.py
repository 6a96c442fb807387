"""Sizes of aspect-ratio buckets, and which image goes where."""

from __future__ import annotations

import math

import pytest

from dreamlora.data.buckets import bucket_sizes, default_step, nearest


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (1024, 64), (64, 8), (768, 16), (100, 64)])
def test_sizes_have_the_area_of_the_square(resolution: int, step: int) -> None:
    sizes = bucket_sizes(resolution, step)
    assert (resolution, resolution) in sizes and len(set(sizes)) == len(sizes)
    for width, height in sizes:
        assert (height, width) in sizes
        assert width * height <= resolution**2 and max(width, height) <= 2 * resolution
        if (width, height) != (resolution, resolution):
            assert width % step == height % step == 0
            assert min(width, height) >= resolution / 2
            # the largest: one step more on the short side would be too much
            assert (min(width, height) + step) * max(width, height) > resolution**2


def test_known_sizes() -> None:
    tall = ((32, 96), (32, 112), (32, 128), (48, 80))
    assert bucket_sizes(64, 16) == (*tall, (64, 64), (80, 48), (96, 32), (112, 32), (128, 32))
    assert {(512, 512), (448, 576), (576, 448), (256, 1024), (384, 640)} <= set(bucket_sizes(512, 64))


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((3000, 3000), (512, 512)),
        ((4000, 3000), (576, 448)),
        ((1080, 1920), (384, 640)),
        ((10, 1000), (256, 1024)),
        ((510, 512), (512, 512)),
        ((525, 1000), (384, 640)),  # by difference instead of ratio, (320, 704) would be nearer
    ],
)
def test_nearest_aspect_ratio(size: tuple[int, int], expected: tuple[int, int]) -> None:
    sizes = bucket_sizes(512, 64)
    assert nearest(size, sizes) == expected
    best = min(abs(math.log(w / h) - math.log(size[0] / size[1])) for w, h in sizes)
    assert abs(math.log(expected[0] / expected[1]) - math.log(size[0] / size[1])) == pytest.approx(best)


def test_of_one_shape_the_largest() -> None:
    assert nearest((7, 7), ((64, 64), (128, 128), (32, 32))) == (128, 128)


@pytest.mark.parametrize(
    ("resolution", "multiple", "step"), [(512, 8, 64), (1024, 16, 64), (64, 8, 8), (64, 16, 16), (200, 16, 32)]
)
def test_default_step(resolution: int, multiple: int, step: int) -> None:
    assert default_step(resolution, multiple) == step
