"""Resizing, cropping and mirroring."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dreamlora.config import Data
from dreamlora.data.transforms import Preparation, Variant, crop, prepare, resized, variants, view_of
from dreamlora.interfaces import View

HOW = Preparation(resolution=32)


def noise(width: int, height: int) -> Image.Image:
    """Smooth enough that interpolation is well conditioned."""
    small = np.random.default_rng(0).integers(0, 255, (height // 4, width // 4, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    "size, expected", [((64, 64), (32, 32)), ((100, 50), (64, 32)), ((50, 75), (32, 48)), ((3, 7), (32, 74))]
)
def test_resized(size, expected):
    """The longer side as torchvision's Resize computes it: int(resolution * longer / shorter)."""
    assert resized(size, (32, 32)) == expected


def test_square_and_centre_crops():
    assert variants((64, 64), "h", HOW) == [Variant((0, 0, 32, 32), False)]
    centred = replace(HOW, center_crop=True)
    assert variants((100, 50), "h", centred) == [Variant((16, 0, 48, 32), False)]
    assert variants((50, 75), "h", replace(centred, random_flip=True)) == [
        Variant((0, 8, 32, 40), False),
        Variant((0, 8, 32, 40), True),
    ]
    assert variants((100, 50), "h", replace(HOW, random_flip=True).fixed()) == variants((100, 50), "h", centred)


def test_random_crops():
    crops = variants((100, 50), "h", HOW)
    assert len(crops) == 4 and all(0 <= box[0] <= 32 and box[1] == 0 and box[2] - box[0] == 32 for box, _ in crops)
    assert variants((100, 50), "h", replace(HOW, crop_variants=2)) == crops[:2]
    assert variants((100, 50), "other", HOW) != crops
    assert variants((100, 50), "h", replace(HOW, seed=1)) != crops
    flipped = variants((100, 50), "h", replace(HOW, random_flip=True))
    assert [v.crop_box for v in flipped[::2]] == [v.crop_box for v in crops] == [v.crop_box for v in flipped[1::2]]
    assert [v.flipped for v in flipped] == [False, True] * 4


@pytest.mark.parametrize(
    ("size", "box", "corner", "mirrored"),
    [
        ((100, 50), (3, 0, 35, 32), (3, 0), (29, 0)),  # 64 x 32 before it is cropped
        ((48, 96), (0, 5, 32, 37), (0, 5), (0, 5)),
        ((20, 10), (30, 0, 62, 32), (30, 0), (2, 0)),  # enlarged to 64 x 32
        ((100, 50), (4, 0, 52, 32), (4, 0), (12, 0)),  # of a bucket
    ],
)
def test_a_view_is_of_the_image_as_it_was_and_of_the_crop_in_the_resized_one(size, box, corner, mirrored):
    """Places in a mirrored image are those after it was mirrored, as in diffusers' script, which crops then."""
    target = box[2] - box[0], box[3] - box[1]
    assert view_of(size, Variant(box, False)) == View(size, corner, target)
    assert view_of(size, Variant(box, True)) == View(size, mirrored, target)


def test_random_crops_are_uniform():
    drawn = variants((36, 32), "h", replace(HOW, crop_variants=2000))
    counts = np.bincount([box[0] for box, _ in drawn], minlength=5)
    assert len(counts) == 5 and counts.min() > 330


@pytest.mark.parametrize("interpolation", ["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"])
def test_same_as_resizing_first_and_cropping_then(interpolation):
    how = replace(HOW, interpolation=interpolation)
    image = noise(200, 120)
    whole = image.resize(resized(image.size, (32, 32)), Image.Resampling[interpolation.upper()])
    for variant in variants(image.size, "h", how):
        expected = np.asarray(whole.crop(variant.crop_box), np.int16)
        assert np.abs(crop(image, variant, how) - expected).max() <= 1


def test_prepare():
    image = noise(64, 64)
    plain = prepare(image, Variant((0, 0, 32, 32), False), HOW)
    mirrored = prepare(image, Variant((0, 0, 32, 32), True), HOW)
    assert plain.shape == (3, 32, 32) and plain.dtype == torch.float32 and plain.is_contiguous()
    assert torch.equal(mirrored, plain.flip(-1)) and not torch.equal(mirrored, plain)
    ends = np.zeros((32, 32, 3), np.uint8)
    ends[:16, :, 2] = 255
    pixels = prepare(Image.fromarray(ends), Variant((0, 0, 32, 32), False), HOW)
    assert (pixels[2, :16] == 1).all() and (pixels[2, 16:] == -1).all() and (pixels[:2] == -1).all()


def test_panorama_needs_no_huge_image():
    """Resized whole it would be 3.2 million pixels wide."""
    image = Image.new("RGB", (10_000, 2), "red")
    how = replace(HOW, resolution=640)
    assert crop(image, variants(image.size, "h", how)[-1], how).shape == (640, 640, 3)


def test_options():
    data = Data(center_crop=True, random_flip=True, image_interpolation_mode="box", crop_variants=7)
    assert Preparation.of(data, 512, 3) == Preparation(512, "box", True, True, 7, 3)
    assert Preparation.of(replace(data, resolution=64), 512, 3).resolution == 64
