"""How Qwen-Image-Edit, and Plus (2509, 2511), see the image before an edit: as latents, and as a part of the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature

from dreamlora.errors import UserError
from dreamlora.interfaces import PICTURE, Components, Conditioning, ModelSource
from dreamlora.models import loading
from dreamlora.models.image_processor import load_image_processor

PIPELINES: dict[str, Any] = {
    "QwenImageEditPipeline": QwenImageEditPipeline,
    "QwenImageEditPlusPipeline": QwenImageEditPlusPipeline,
}
DROPPED = 64
"""Tokens before the picture, whose states the transformer does not see."""
AREA = 1024 * 1024
"""Of the images before an edit, in pixels, whatever the size of the one after it."""

_PLACE = "<|image_pad|>"
_SYSTEM = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n"
)
_MARKED = f"<|vision_start|>{_PLACE}<|vision_end|>"
BEFORE = {
    "QwenImageEditPipeline": _SYSTEM + _MARKED,
    "QwenImageEditPlusPipeline": f"{_SYSTEM}Picture 1: {_MARKED}",
}
"""The template before a prompt."""
_AREAS = {"QwenImageEditPipeline": AREA, "QwenImageEditPlusPipeline": 384 * 384}
"""Of what the text encoder sees, in pixels."""


class ImageTextProcessor:
    """transformers' Qwen2VLProcessor for prompts with still images; its own class needs torchvision.

    Args:
        tokenizer: of the text encoder.
        image_processor: cuts images into patches.
    """

    def __init__(self, tokenizer: Any, image_processor: Any) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor

    def __call__(self, text: Sequence[str], images: Any, padding: bool, return_tensors: str) -> BatchFeature:
        """Token ids and mask of texts, in each of which a mark stands for an image; the images' patches and grids."""
        seen = self.image_processor(images=images, return_tensors=return_tensors)
        tokens = iter(self.tokens_of(seen["image_grid_thw"]))
        texts = [_PLACE.join(_spread(each.split(_PLACE), tokens)) for each in text]
        return BatchFeature({**self.tokenizer(texts, padding=padding, return_tensors=return_tensors), **seen})

    def tokens_of(self, grids: Tensor) -> list[int]:
        """How many tokens stand for each image."""
        counts: list[int] = (grids.prod(dim=1) // self.image_processor.merge_size**2).tolist()
        return counts


def _spread(parts: list[str], tokens: Iterator[int]) -> list[str]:
    """The text between the marks, where each mark is as many as the tokens of its image."""
    spread = parts[:1]
    for part in parts[1:]:
        spread += [""] * (next(tokens) - 1) + [part]
    return spread


def load_processor(source: ModelSource, text: Components) -> ImageTextProcessor:
    """The processor of a pipeline.

    Raises:
        UserError: its numbers are none, or not those of the text encoder.
    """
    place = loading.place_of(source, "processor")
    images, config = load_image_processor(place), text["text_encoder"].config
    for name, own in (
        ("patch_size", config.vision_config.patch_size),
        ("temporal_patch_size", config.vision_config.temporal_patch_size),
        ("merge_size", config.vision_config.spatial_merge_size),
    ):
        if getattr(images, name) != own:
            raise UserError(
                f"{place}: it cuts images with {name} {getattr(images, name)}, but the text encoder expects {own}: "
                "they do not belong together; download or export the model again"
            )
    if text["tokenizer"].convert_tokens_to_ids(_PLACE) != config.image_token_id:
        raise UserError(
            f"{source.path}: the tokenizer's {_PLACE} is not the text encoder's image_token_id: they do not belong "
            "together; download or export the model again"
        )
    return ImageTextProcessor(text["tokenizer"], images)


def picture(kind: str, image: Image.Image) -> Tensor:
    """What the text encoder of a pipeline of this class sees of an image: ``[3, h, w]`` uint8."""
    return torch.from_numpy(np.array(_resized(image, _AREAS[kind]))).permute(2, 0, 1).contiguous()


def prepared(pixels: Tensor) -> Tensor:
    """Pixels ``[B, 3, H, W]`` in [-1, 1] as the pipelines encode them: in an area of their own, ``[B, 3, h, w]``."""
    images = [Image.fromarray(each) for each in _bytes(pixels)]
    return torch.cat([VaeImageProcessor(vae_scale_factor=16).preprocess(_resized(each, AREA)) for each in images])


def _bytes(pixels: Tensor) -> np.ndarray:
    rows: np.ndarray = pixels.cpu().mul(127.5).add(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return rows


def _resized(image: Image.Image, area: int) -> Image.Image:
    width, height = pipeline_qwenimage_edit.calculate_dimensions(area, image.width / image.height)[:2]
    resized: Image.Image = VaeImageProcessor(vae_scale_factor=16).resize(image, height, width)
    return resized


def with_patches(text: Components, tokens: Conditioning) -> Conditioning:
    """Token ids and mask ``[B, L]`` with as many tokens for each picture as the text encoder makes of it; its patches
    and grids.
    """
    processor: ImageTextProcessor = text["processor"]
    images = [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in tokens[PICTURE].cpu()]
    seen = processor.image_processor(images=images, return_tensors="pt")
    place = text["text_encoder"].config.image_token_id
    rows = []
    for ids, mask, count in zip(
        tokens["input_ids"], tokens["attention_mask"].bool(), processor.tokens_of(seen["image_grid_thw"]), strict=True
    ):
        repeats = torch.where(ids[mask] == place, count, 1)
        rows.append(ids[mask].repeat_interleave(repeats))
    return {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "pixel_values": seen["pixel_values"],
        "image_grid_thw": seen["image_grid_thw"],
    }
