"""torchvision.transforms' Compose, Resize, crops, flip, ToTensor and Normalize for PIL images, on Pillow.

Only what diffusers' scripts call, as torchvision means it: ``Resize(int)`` scales the shorter side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from . import functional
from .functional import InterpolationMode

__all__ = [
    *("CenterCrop", "Compose", "InterpolationMode", "Normalize", "RandomCrop", "RandomHorizontalFlip", "Resize"),
    *("ToTensor", "functional"),
]


class Compose:
    """One transform after the other."""

    def __init__(self, transforms: Sequence[Callable[[Any], Any]]) -> None:
        self.transforms = transforms

    def __call__(self, image: Any) -> Any:
        for transform in self.transforms:
            image = transform(image)
        return image


class Resize:
    """See ``functional.resize``."""

    def __init__(
        self, size: int | Sequence[int], interpolation: InterpolationMode = InterpolationMode.BILINEAR
    ) -> None:
        self.size, self.interpolation = size, interpolation

    def __call__(self, image: Image.Image) -> Image.Image:
        return functional.resize(image, self.size, self.interpolation)


class CenterCrop:
    """See ``functional.center_crop``."""

    def __init__(self, size: int | Sequence[int]) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        return functional.center_crop(image, self.size)


class RandomCrop:
    """``(height, width)``, or a square, from anywhere, drawn from torch's global random state."""

    def __init__(self, size: int | Sequence[int]) -> None:
        self.size = size

    @staticmethod
    def get_params(image: Image.Image, output_size: int | Sequence[int]) -> tuple[int, int, int, int]:
        """Top, left, height and width of a crop."""
        height, width = functional.two(output_size)
        if image.size == (width, height):
            return 0, 0, height, width
        top = int(torch.randint(image.height - height + 1, ()))
        left = int(torch.randint(image.width - width + 1, ()))
        return top, left, height, width

    def __call__(self, image: Image.Image) -> Image.Image:
        return functional.crop(image, *self.get_params(image, self.size))


class RandomHorizontalFlip:
    """Left and right change places with a probability of ``p``."""

    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        return functional.hflip(image) if float(torch.rand(())) < self.p else image


class ToTensor:
    """See ``functional.to_tensor``."""

    def __call__(self, image: Image.Image) -> Tensor:
        return functional.to_tensor(image)


class Normalize:
    """See ``functional.normalize``."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = mean, std

    def __call__(self, image: Tensor) -> Tensor:
        return functional.normalize(image, self.mean, self.std)
