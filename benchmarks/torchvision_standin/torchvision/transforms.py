"""torchvision.transforms' Compose, Resize, CenterCrop, RandomCrop, ToTensor and Normalize for PIL images, on Pillow.

Only what diffusers' script calls, as torchvision means it: ``Resize(int)`` scales the shorter side, crops are square.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class InterpolationMode(enum.Enum):
    """Filters, by Pillow's names."""

    NEAREST = "nearest"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class Compose:
    """One transform after the other."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = transforms

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


class Resize:
    """The shorter side becomes ``size``."""

    def __init__(self, size: int, interpolation: InterpolationMode = InterpolationMode.BILINEAR) -> None:
        self.size = size
        self.filter = Image.Resampling[interpolation.name]

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        if min(width, height) == self.size:
            return image
        if width <= height:
            return image.resize((self.size, int(self.size * height / width)), self.filter)
        return image.resize((int(self.size * width / height), self.size), self.filter)


class CenterCrop:
    """The middle ``size`` x ``size`` pixels."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        return _crop(image, round((image.width - self.size) / 2), round((image.height - self.size) / 2), self.size)


class RandomCrop:
    """``size`` x ``size`` pixels from anywhere, drawn from torch's global random state."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        if image.size == (self.size, self.size):
            return image
        left = int(torch.randint(image.width - self.size + 1, ()))
        top = int(torch.randint(image.height - self.size + 1, ()))
        return _crop(image, left, top, self.size)


class ToTensor:
    """RGB image to ``[3, H, W]`` float32 in [0, 1]."""

    def __call__(self, image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
        return pixels.permute(2, 0, 1).contiguous().float().div(255)


class Normalize:
    """``(x - mean) / std`` per channel."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean = torch.tensor(mean).view(-1, 1, 1)
        self.std = torch.tensor(std).view(-1, 1, 1)

    def __call__(self, image: Tensor) -> Tensor:
        return (image - self.mean) / self.std


def _crop(image: Image.Image, left: int, top: int, size: int) -> Image.Image:
    return image.crop((left, top, left + size, top + size))
