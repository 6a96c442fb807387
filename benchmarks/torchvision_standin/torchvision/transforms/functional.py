"""torchvision.transforms.functional's resize, crops, flip, to_tensor and normalize for PIL images, on Pillow."""

from __future__ import annotations

import enum
from collections.abc import Sequence

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


def resize(
    image: Image.Image, size: int | Sequence[int], interpolation: InterpolationMode = InterpolationMode.BILINEAR
) -> Image.Image:
    """To (height, width), or such that the shorter side becomes ``size``."""
    width, height = image.size
    if not isinstance(size, int):
        wanted = (size[1], size[0])
    elif width <= height:
        wanted = (size, int(size * height / width))
    else:
        wanted = (int(size * width / height), size)
    return image if image.size == wanted else image.resize(wanted, Image.Resampling[interpolation.name])


def crop(image: Image.Image, top: int, left: int, height: int, width: int) -> Image.Image:
    """The part of an image that begins at a row and column."""
    return image.crop((left, top, left + width, top + height))


def center_crop(image: Image.Image, output_size: int | Sequence[int]) -> Image.Image:
    """The middle ``(height, width)``, or a square."""
    height, width = two(output_size)
    return crop(image, round((image.height - height) / 2), round((image.width - width) / 2), height, width)


def hflip(image: Image.Image) -> Image.Image:
    """Left and right change places."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def to_tensor(image: Image.Image) -> Tensor:
    """RGB image to ``[3, H, W]`` float32 in [0, 1]."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.permute(2, 0, 1).contiguous().float().div(255)


def normalize(image: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """``(x - mean) / std`` per channel."""
    return (image - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)


def two(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width; of one number, both."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])
