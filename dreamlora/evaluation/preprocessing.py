"""From images to an encoder's pixels, with Pillow: the same numbers whether torchvision is installed or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Gt, Le, Len
from PIL import Image
from torch import Tensor
from typing_extensions import TypedDict

from dreamlora.data.rgb import to_rgb
from dreamlora.errors import UserError
from dreamlora.reading import Schema, read_json

Picture = Image.Image | np.ndarray


@dataclass(frozen=True)
class Preprocessing:
    """How pixels are made.

    Attributes:
        resize: shorter side, or (height, width) if the proportions are not kept.
        crop: side of the square cut from the middle; None: nothing is cut off.
        resample: Pillow's filter.
        scale: factor from 0..255.
        mean: of each colour, subtracted.
        std: of each colour, divided by.
    """

    resize: int | tuple[int, int]
    crop: int | None
    resample: Image.Resampling
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def id(self) -> str:
        """What an encoder's id says of it; mean and scale lie in the model's folder, so its fingerprint has them."""
        size = self.resize if isinstance(self.resize, int) else "x".join(map(str, self.resize))
        return f"pil-{self.resample.name.lower()}{size}" + (f"-crop{self.crop}" if self.crop else "")

    def __call__(self, pictures: Sequence[Picture]) -> Tensor:
        """Pixels ``[n, 3, height, width]`` float32.

        Raises:
            TypeError: not PIL images or uint8 arrays ``[H, W, 3]``.
        """
        return torch.stack([self._one(as_image(picture)) for picture in pictures])

    def _one(self, image: Image.Image) -> Tensor:
        small = self._cropped(image.resize(self._size(*image.size), self.resample))
        pixels = torch.from_numpy(np.asarray(small, dtype=np.float32)) * self.scale
        return ((pixels - torch.tensor(self.mean)) / torch.tensor(self.std)).permute(2, 0, 1).contiguous()

    def _size(self, width: int, height: int) -> tuple[int, int]:
        if not isinstance(self.resize, int):
            return self.resize[1], self.resize[0]
        short, long = sorted((width, height))
        longer = int(self.resize * long / short)  # cut off, not rounded, as transformers and torchvision do
        return (self.resize, longer) if width <= height else (longer, self.resize)

    def _cropped(self, image: Image.Image) -> Image.Image:
        if self.crop is None:
            return image
        left, top = (image.width - self.crop) // 2, (image.height - self.crop) // 2
        return image.crop((left, top, left + self.crop, top + self.crop))


DINO = Preprocessing(256, 224, Image.Resampling.BICUBIC, 1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""As in the evaluations of CustomConcept101 and DreamBench++; the processor in DINO's repositories squeezes instead."""


def as_image(picture: Picture) -> Image.Image:
    """RGB image of a PIL image or a uint8 array ``[H, W, 3]``.

    Raises:
        TypeError: anything else; above all floats, whose range would be a guess.
    """
    if isinstance(picture, Image.Image):
        return to_rgb(picture)
    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3:
        return Image.fromarray(picture)
    got = f"{type(picture).__name__} {getattr(picture, 'dtype', '')} {tuple(getattr(picture, 'shape', ()))}"
    raise TypeError(f"expected PIL images or uint8 HWC arrays (got {got})")


LARGEST_SIDE = 4096
"""Of the images that an encoder sees; 512 in all known ones."""
_CONFIG_BYTES = 2**20
_Side = Annotated[int, Ge(1), Le(LARGEST_SIDE)]


class _Size(TypedDict, total=False):
    shortest_edge: _Side
    height: _Side
    width: _Side


class _Config(TypedDict, total=False):
    size: _Side | _Size | None
    crop_size: _Side | _Size | None
    do_resize: bool | None
    do_center_crop: bool | None
    resample: Annotated[int, Ge(0), Le(5)] | None
    rescale_factor: Annotated[float, Gt(0), Le(1)] | None
    image_mean: Annotated[list[Annotated[float, Ge(-1000), Le(1000)]], Len(3, 3)] | None
    image_std: Annotated[list[Annotated[float, Ge(1e-6), Le(1000)]], Len(3, 3)] | None


class _Processor(_Config, total=False):
    image_processor: _Config


_PROCESSOR = Schema(_Processor)


def read_preprocessing(file: Path, keeps_proportions: bool) -> Preprocessing:
    """The preprocessing that ``preprocessor_config.json`` (or ``processor_config.json``) describes.

    Args:
        file: of the model.
        keeps_proportions: what a size given as one number means: the shorter side, or both sides.

    Raises:
        UserError: it describes something else, or is no such file.
    """
    loaded = read_json(file, _PROCESSOR, most=_CONFIG_BYTES)
    config = {name: value for name, value in loaded.get("image_processor", loaded).items() if value is not None}
    try:
        crop = _side(config["crop_size"]) if config.get("do_center_crop") else None
        resize = _resize(config["size"], keeps_proportions)
        if not config.get("do_resize", True) or (crop and crop > (resize if isinstance(resize, int) else min(resize))):
            raise ValueError("it would not give images of one size")
        return Preprocessing(
            resize=resize,
            crop=crop,
            resample=Image.Resampling(config.get("resample", Image.Resampling.BICUBIC)),
            scale=config.get("rescale_factor", 1 / 255),
            mean=_colours(config["image_mean"]),
            std=_colours(config["image_std"]),
        )
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{file}: this way to prepare images is not supported ({error}); use another encoder"
        ) from error


def _resize(size: Any, keeps_proportions: bool) -> int | tuple[int, int]:
    if isinstance(size, int):
        return size if keeps_proportions else (size, size)
    return size["shortest_edge"] if "shortest_edge" in size else (size["height"], size["width"])


def _side(size: Any) -> int:
    if isinstance(size, int):
        return size
    if size["height"] != size["width"]:
        raise ValueError(f"it crops to {size['height']} x {size['width']}")
    return int(size["height"])


def _colours(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = map(float, values)
    return red, green, blue
