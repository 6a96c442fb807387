"""Encoders of the real classes with random weights, and a few pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    ViTConfig,
    ViTModel,
)

from tests.tinymodels import CLIP_LENGTH, clip_tokenizer

SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def save_clip(folder: Path) -> Path:
    """A CLIPModel for 24 x 24 pixels and texts of CLIP_LENGTH tokens."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    marks = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = SIZE | marks | {"vocab_size": len(tokenizer), "max_position_embeddings": CLIP_LENGTH}
    config = CLIPConfig(text_config=text, vision_config=SIZE | {"image_size": 24, "patch_size": 8}, projection_dim=12)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}).save_pretrained(folder)
    return folder


def save_siglip(folder: Path) -> Path:
    """A SiglipModel for 24 x 24 pixels, squeezed."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    text = SIZE | {"vocab_size": len(tokenizer), "max_position_embeddings": CLIP_LENGTH, "projection_size": 16}
    config = SiglipConfig(text_config=text, vision_config=SIZE | {"image_size": 24, "patch_size": 8})
    SiglipModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    SiglipImageProcessor(size={"height": 24, "width": 24}).save_pretrained(folder)
    return folder


def save_dino(folder: Path) -> Path:
    """A ViTModel for 224 x 224 pixels without pooler, as DINO's repositories have it."""
    torch.manual_seed(0)
    ViTModel(ViTConfig(**SIZE, image_size=224, patch_size=56), add_pooling_layer=False).save_pretrained(folder)
    return folder


def save_dinov2(folder: Path) -> Path:
    """A Dinov2Model for 28 x 28 pixels."""
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


SAVERS = {"clip": save_clip, "siglip": save_siglip, "dino": save_dino, "dinov2": save_dinov2}


@pytest.fixture(scope="session")
def encoder_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder per kind of encoder; not to be written to."""
    place = tmp_path_factory.mktemp("encoders")
    return {name: save(place / name) for name, save in SAVERS.items()}


@pytest.fixture(scope="session")
def pictures() -> list[Image.Image]:
    """Pictures of odd sizes, wide and high."""
    draw = np.random.default_rng(0)
    sizes = [(40, 40), (61, 33), (30, 77), (24, 24), (301, 250)]
    small = [Image.fromarray(draw.integers(0, 256, (9, 7, 3), dtype=np.uint8)) for _ in sizes]
    return [image.resize(size, Image.Resampling.BICUBIC) for image, size in zip(small, sizes, strict=True)]
