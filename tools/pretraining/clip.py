"""Stage `clip`: a small CLIP of the same world, for CLIP scores and subject similarity without downloads."""

import random
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from dreamlora.tiny import world
from pretraining import data, tokenizer
from pretraining.optim import PretrainingRecipe, PretrainingRun

WIDTH, PATCH, IMAGE_LAYERS, TEXT_LAYERS = 96, 8, 4, 2
BATCH = 192
MUON_LR, ADAMW_LR = 2e-3, 1e-3
CAPTION_DROP = 0.1  # of the attributes: less than for the denoiser, because a poorer caption fits more pictures
CANDIDATES = 64  # captions that a retrieval chooses from


def build(words: CLIPTokenizer) -> CLIPModel:
    """An untrained CLIPModel for 64x64 pictures."""
    shared = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": 4}
    vision = shared | {"num_hidden_layers": IMAGE_LAYERS, "image_size": world.SIZE, "patch_size": PATCH}
    text = shared | {
        "num_hidden_layers": TEXT_LAYERS,
        "vocab_size": len(words),
        "max_position_embeddings": tokenizer.MAX_LENGTH,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)
    return CLIPModel(config)


def similarities(model: CLIPModel, pixels: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Scaled cosines, (images, texts)."""
    return model(input_ids=tokens, pixel_values=pixels).logits_per_image


@torch.no_grad()
def retrieval(model: CLIPModel, words: CLIPTokenizer, groups: int = 4) -> float:
    """How often a held-out picture finds its full caption among CANDIDATES (image to text, R@1)."""
    hits = []
    for group in range(groups):
        pixels, scenes = data.held_out_pictures(CANDIDATES, seed=100 + group)
        texts = [world.describe(scene) for scene in scenes]
        tokens = words(texts, padding="max_length", return_tensors="pt").input_ids
        best = similarities(model, pixels.to(model.device), tokens.to(model.device)).argmax(1).cpu()
        hits += [texts[found] == text for found, text in zip(best.tolist(), texts, strict=True)]
    return float(np.mean(hits))


def train(folder: Path, minutes: float, device: torch.device) -> None:
    """Train for `minutes`; checkpoint (and resume) as clip.pt in `folder`."""
    torch.manual_seed(0)
    words = tokenizer.build()
    pictures, scenes = data.load_pictures(folder, "captioned"), data.load_scenes(folder)
    run = PretrainingRun(build(words), PretrainingRecipe("clip", minutes, MUON_LR, ADAMW_LR), folder, device)
    draw, rng = np.random.default_rng(run.step), random.Random(run.step)
    targets = torch.arange(BATCH, device=device)
    while run.unfinished:
        chosen = draw.integers(len(pictures), size=BATCH)
        texts = [world.describe(scenes[i], rng, drop=CAPTION_DROP) for i in chosen]
        tokens = words(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        logits = similarities(run.model, data.to_tensor(pictures[chosen]).to(device), tokens.to(device))
        loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
        run.update(loss, lambda: f"R@1 {retrieval(run.average.module, words):.3f}")
