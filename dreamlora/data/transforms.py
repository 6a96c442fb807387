"""Resize, crop and mirror, with the meaning of diffusers' flags.

The autoencoder is freed before training, so a random crop cannot be drawn anew at every step: a fixed number of random
crops is encoded per image instead (``crop_variants``), each mirrored too if ``random_flip`` is set, and training draws
among these.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dreamlora.config import Data
from dreamlora.randomness import generator


@dataclass(frozen=True)
class Preparation:
    """How images become training squares; see the options of the same names.

    Attributes:
        resolution: side of the squares in pixels.
        seed: decides where the random crops lie.
    """

    resolution: int
    interpolation: str = "lanczos"
    center_crop: bool = False
    random_flip: bool = False
    crop_variants: int = 4
    seed: int = 0

    @classmethod
    def of(cls, data: Data, resolution: int, seed: int) -> Preparation:
        """As the options say, at ``data.resolution``, or else the model's own ``resolution``."""
        return cls(
            data.resolution or resolution,
            data.image_interpolation_mode,
            data.center_crop,
            data.random_flip,
            data.crop_variants,
            seed,
        )

    def fixed(self) -> Preparation:
        """The same without anything random, for images that are measured on."""
        return replace(self, center_crop=True, random_flip=False)


class Variant(NamedTuple):
    """One square of an image.

    Attributes:
        crop_box: left, top, right, bottom in pixels of the image after its shorter side became ``resolution``.
        flipped: mirrored left to right.
    """

    crop_box: tuple[int, int, int, int]
    flipped: bool


def resized(size: tuple[int, int], resolution: int) -> tuple[int, int]:
    """Width and height after the shorter side became ``resolution``; the other one is rounded down."""
    shorter = min(size)
    return resolution * size[0] // shorter, resolution * size[1] // shorter


def variants(size: tuple[int, int], content_hash: str, how: Preparation) -> list[Variant]:
    """The squares to encode of an image of ``size``: one, or ``crop_variants`` random ones if it is not square.

    Random ones are drawn from (seed, content hash, number), uniformly over all places; in an image that is nearly
    square some may coincide. With ``random_flip``, each is followed by its mirror image.
    """
    spare = tuple(side - how.resolution for side in resized(size, how.resolution))
    if how.center_crop or spare == (0, 0):
        corners = [(round(spare[0] / 2), round(spare[1] / 2))]
    else:
        corners = [_random_corner(spare, content_hash, k, how.seed) for k in range(how.crop_variants)]
    boxes = [(x, y, x + how.resolution, y + how.resolution) for x, y in corners]
    return [Variant(box, flipped) for box in boxes for flipped in ([False, True] if how.random_flip else [False])]


def crop(image: Image.Image, variant: Variant, how: Preparation) -> np.ndarray:
    """The square as uint8 ``[R, R, 3]``.

    Resizes the crop's part of the image only: the same pixels as resizing all of it and cropping then (the filter looks
    beyond the box), but a panorama does not become a huge image on the way.
    """
    width, height = resized(image.size, how.resolution)
    left, top, right, bottom = variant.crop_box
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, min(right * across, image.width), min(bottom * down, image.height))
    square = image.resize((how.resolution, how.resolution), Image.Resampling[how.interpolation.upper()], box=box)
    if variant.flipped:
        square = square.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(square)


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 ``[R, R, 3]`` as float32 ``[3, R, R]`` in [-1, 1]."""
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div_(255).sub_(0.5).div_(0.5)


def prepare(image: Image.Image, variant: Variant, how: Preparation) -> Tensor:
    """The square of an RGB image as float32 ``[3, R, R]`` in [-1, 1]."""
    return to_tensor(crop(image, variant, how))


def _random_corner(spare: tuple[int, ...], content_hash: str, k: int, seed: int) -> tuple[int, int]:
    draw = generator(seed, "crop", content_hash, k)
    x, y = (int(torch.randint(room + 1, (), generator=draw)) for room in spare)
    return x, y
