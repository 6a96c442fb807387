"""Resize, crop and mirror, with the meaning of diffusers' flags; to a square, or to the nearest of several sizes.

The autoencoder is freed before training, so a random crop cannot be drawn anew at every step: a fixed number of random
crops is encoded per image instead (``crop_variants``), each mirrored too if ``random_flip`` is set, and training draws
among these.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dreamlora.config import Data
from dreamlora.data.buckets import Size, bucket_sizes, nearest
from dreamlora.data.images import ImageRecord
from dreamlora.interfaces import View
from dreamlora.randomness import generator


@dataclass(frozen=True)
class Preparation:
    """How images become what is trained on; see the options of the same names.

    Attributes:
        resolution: side of the squares in pixels.
        seed: decides where the random crops lie.
        sizes: of the aspect-ratio buckets, width and height in pixels; none: squares only.
    """

    resolution: int
    interpolation: str = "lanczos"
    center_crop: bool = False
    random_flip: bool = False
    crop_variants: int = 4
    seed: int = 0
    sizes: tuple[Size, ...] = ()

    @classmethod
    def of(cls, data: Data, resolution: int, seed: int) -> Preparation:
        """As the options say, at ``data.resolution``, or else the model's own ``resolution``."""
        side = data.resolution or resolution
        return cls(
            side,
            data.image_interpolation_mode,
            data.center_crop,
            data.random_flip,
            data.crop_variants,
            seed,
            bucket_sizes(side, data.bucket_step) if data.buckets and data.bucket_step else (),
        )

    def fixed(self) -> Preparation:
        """Squares without anything random, for images that are measured on: these must have one size."""
        return replace(self, center_crop=True, random_flip=False, sizes=())

    def target(self, size: Size) -> Size:
        """Width and height that an image of ``size`` is trained at."""
        return nearest(size, self.sizes) if self.sizes else (self.resolution, self.resolution)


@dataclass(frozen=True)
class Preparations:
    """The preparation of every data set of a run, by the number that its images carry."""

    each: tuple[Preparation, ...]

    @classmethod
    def of(cls, data: Data, resolution: int, seed: int) -> Preparations:
        """As the options of every data set say."""
        return cls(tuple(Preparation.of(one, resolution, seed) for one in data.each()))

    def __getitem__(self, record: ImageRecord) -> Preparation:
        """How an image is prepared."""
        return self.each[record.dataset]

    def fixed(self, resolution: int) -> Preparations:
        """Squares of one size without anything random, for images that are measured on."""
        return Preparations(tuple(replace(how.fixed(), resolution=resolution) for how in self.each))


class Variant(NamedTuple):
    """One crop of an image.

    Attributes:
        crop_box: left, top, right, bottom in pixels of the image after it was resized to cover the target.
        flipped: mirrored left to right.
    """

    crop_box: tuple[int, int, int, int]
    flipped: bool


def resized(size: Size, target: Size) -> Size:
    """Width and height of the smallest image of the same shape that covers ``target``; rounded down."""
    if target[0] * size[1] >= target[1] * size[0]:
        return target[0], target[0] * size[1] // size[0]
    return target[1] * size[0] // size[1], target[1]


def enlargement(size: Size, target: Size) -> float:
    """How many times as long the sides of an image of ``size`` become to cover ``target``; below 1 it is shrunk."""
    return max(wanted / side for side, wanted in zip(size, target, strict=True))


def variants(size: Size, content_hash: str, how: Preparation) -> list[Variant]:
    """The crops to encode of an image of ``size``: one, or ``crop_variants`` random ones if anything is cut off.

    Random ones are drawn from (seed, content hash, number), uniformly over all places; in an image that nearly has the
    target's shape some may coincide. With ``random_flip``, each is followed by its mirror image.
    """
    width, height = target = how.target(size)
    spare = tuple(side - wanted for side, wanted in zip(resized(size, target), target, strict=True))
    if how.center_crop or spare == (0, 0):
        corners = [(round(spare[0] / 2), round(spare[1] / 2))]
    else:
        corners = [_random_corner(spare, content_hash, k, how.seed) for k in range(how.crop_variants)]
    boxes = [(x, y, x + width, y + height) for x, y in corners]
    return [Variant(box, flipped) for box in boxes for flipped in ([False, True] if how.random_flip else [False])]


def bucket_numbers(records: Iterable[ImageRecord], how: Preparations) -> Sequence[int] | None:
    """For every image the number of the size that it is trained at, two bytes each; None if there is but one."""
    squares = {(one.resolution, one.resolution) for one in how.each}
    if len(squares) == 1 and not any(one.sizes for one in how.each):
        return None
    sizes = sorted(squares.union(*(one.sizes for one in how.each)))
    number = {size: place for place, size in enumerate(sizes)}
    return array("H", (number[how[record].target(record.facts.size)] for record in records))


def view_of(size: Size, variant: Variant) -> View:
    """What a crop shows of an image of ``size``. In a mirrored one, places are those of the mirrored image."""
    left, top, right, bottom = variant.crop_box
    target = right - left, bottom - top
    if variant.flipped:
        left = resized(size, target)[0] - right
    return View(size, (left, top), target)


def crop(image: Image.Image, variant: Variant, how: Preparation) -> np.ndarray:
    """The crop as uint8 ``[H, W, 3]``.

    Resizes the crop's part of the image only: the same pixels as resizing all of it and cropping then (the filter looks
    beyond the box), but a panorama does not become a huge image on the way.
    """
    left, top, right, bottom = variant.crop_box
    target = right - left, bottom - top
    width, height = resized(image.size, target)
    across, down = image.width / width, image.height / height
    box = (left * across, top * down, min(right * across, image.width), min(bottom * down, image.height))
    pixels = image.resize(target, Image.Resampling[how.interpolation.upper()], box=box)
    if variant.flipped:
        pixels = pixels.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(pixels)


def to_tensor(pixels: np.ndarray) -> Tensor:
    """uint8 ``[H, W, 3]`` as float32 ``[3, H, W]`` in [-1, 1]."""
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float().div_(255).sub_(0.5).div_(0.5)


def prepare(image: Image.Image, variant: Variant, how: Preparation) -> Tensor:
    """The crop of an RGB image as float32 ``[3, H, W]`` in [-1, 1]."""
    return to_tensor(crop(image, variant, how))


def _random_corner(spare: tuple[int, ...], content_hash: str, k: int, seed: int) -> tuple[int, int]:
    draw = generator(seed, "crop", content_hash, k)
    x, y = (int(torch.randint(room + 1, (), generator=draw)) for room in spare)
    return x, y
