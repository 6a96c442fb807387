"""A small Stable Diffusion 3 of the embedded model's world: its transformer is trained here, all else is the embedded
model's and its CLIP's. For what is to be measured on a *trained* transformer.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dreamlora.tiny import clip_path, pipeline_path, world

PICTURES, BATCH, LEARNING_RATE, WARM_UP = 16_000, 32, 2e-3, 50
T5_LENGTH = 8
"""Zeros where T5's tokens would be, as the pipeline has them; the least that ``--max_sequence_length`` takes."""
CAPTION_DROP = 0.1  # for classifier-free guidance
JUDGED = 256  # pictures of held-out combinations that the transformer is judged by
ABOUT = "pretraining.json"


def made(folder: Path, steps: int) -> tuple[Path, dict[str, Any]]:
    """The pipeline's folder, and how good its transformer is; trained if no earlier call has.

    Args:
        folder: where it is kept, by the number of steps.
        steps: of AdamW on batches of BATCH.
    """
    place = folder / f"transformer-{steps}"
    about = place / ABOUT
    if not about.exists():
        pipeline = _build()
        found = _pretrain(pipeline, steps)
        pipeline.save_pretrained(place)
        about.write_text(json.dumps(found, indent=2), encoding="utf-8")
    return place, json.loads(about.read_text(encoding="utf-8"))


def _build() -> StableDiffusion3Pipeline:
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(pipeline_path(), subfolder="vae")
    vae.register_to_config(shift_factor=0.0)
    width = 96
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        num_layers=4,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=2 * width,
        caption_projection_dim=128,
        pooled_projection_dim=2 * width,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    pipeline = StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=_with_projection(
            CLIPTextModel.from_pretrained(pipeline_path(), subfolder="text_encoder"), torch.eye(width)
        ),
        tokenizer=CLIPTokenizer.from_pretrained(pipeline_path(), subfolder="tokenizer"),
        text_encoder_2=_clips_own(),
        tokenizer_2=CLIPTokenizer.from_pretrained(clip_path()),
        text_encoder_3=None,
        tokenizer_3=None,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _clips_own() -> CLIPTextModelWithProjection:
    clip = CLIPModel.from_pretrained(clip_path())
    return _with_projection(clip.text_model, clip.text_projection.weight.detach())


def _with_projection(encoder: Any, projection: Tensor) -> CLIPTextModelWithProjection:
    """An encoder of prompts, and the matrix ``[P, D]`` that its pooled state goes through."""
    config = CLIPTextConfig.from_dict({**encoder.config.to_dict(), "projection_dim": len(projection)})
    whole = CLIPTextModelWithProjection(config)
    own = {name.removeprefix("text_model."): value for name, value in encoder.state_dict().items()}
    missing = whole.text_model.load_state_dict(own, strict=False).missing_keys
    assert not [name for name in missing if "position_ids" not in name], missing
    whole.text_projection.weight.data.copy_(projection)
    return whole.eval()


def _pretrain(pipeline: StableDiffusion3Pipeline, steps: int) -> dict[str, Any]:
    """Rectified flow with logit-normal times; the result says how good the transformer has become."""
    started = time.perf_counter()
    rng = random.Random(0)
    scenes = [world.sample_scene(rng) for _ in range(PICTURES)]
    latents = _latents(pipeline, scenes, rng)
    judged = [world.sample_scene(rng, held_out=True) for _ in range(JUDGED)]
    judged_latents = _latents(pipeline, judged, rng)
    before = _judge(pipeline, judged_latents, judged)
    model, generator = pipeline.transformer.train(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / WARM_UP) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    for chosen in _batches(steps, rng):
        captions = [
            "" if rng.random() < CAPTION_DROP else world.describe(scenes[index], rng, drop=0.1) for index in chosen
        ]
        loss = _errors(pipeline, latents[chosen], captions, generator).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if schedule.last_epoch % 100 == 0:
            seconds = time.perf_counter() - started
            print(f"pretraining: step {schedule.last_epoch} of {steps}, loss {loss.item():.4f}, {seconds:.0f} s")
    model.eval()
    return {
        "steps": steps,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": round(time.perf_counter() - started),
        "loss_untrained": before,
        "loss": _judge(pipeline, judged_latents, judged),
        "loss_with_another_pictures_caption": _judge(pipeline, judged_latents, [*judged[1:], judged[0]]),
    }


def _batches(steps: int, rng: random.Random) -> Iterator[list[int]]:
    order: list[int] = []
    for _ in range(steps):
        if len(order) < BATCH:
            order = rng.sample(range(PICTURES), PICTURES)
        yield order[:BATCH]
        del order[:BATCH]


@torch.no_grad()
def _latents(pipeline: StableDiffusion3Pipeline, scenes: list[world.Scene], rng: random.Random) -> Tensor:
    """``[n, 4, 16, 16]`` of the scenes as they are drawn."""
    found = []
    for start in range(0, len(scenes), 64):
        pictures = np.stack([np.asarray(world.render(scene, rng)) for scene in scenes[start : start + 64]])
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1
        found.append(pipeline.vae.encode(pixels).latent_dist.mode())
    return torch.cat(found)


def _errors(
    pipeline: StableDiffusion3Pipeline, latents: Tensor, captions: list[str], generator: torch.Generator
) -> Tensor:
    """Squared error of the velocity, one per picture."""
    embeds, pooled = _embedded(pipeline, captions)
    noise = torch.randn(latents.shape, generator=generator)
    sigmas = torch.randn(len(latents), generator=generator).sigmoid()
    share = sigmas.view(-1, 1, 1, 1)
    velocity = pipeline.transformer(
        hidden_states=(1 - share) * latents + share * noise,
        timestep=1000 * sigmas,
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        return_dict=False,
    )[0]
    return F.mse_loss(velocity, noise - latents, reduction="none").mean((1, 2, 3))


@torch.no_grad()
def _embedded(pipeline: StableDiffusion3Pipeline, captions: list[str]) -> tuple[Tensor, Tensor]:
    """As the pipeline makes them without T5."""
    states, pooled = [], []
    for encoder, tokenizer in (
        (pipeline.text_encoder, pipeline.tokenizer),
        (pipeline.text_encoder_2, pipeline.tokenizer_2),
    ):
        ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        output = encoder(ids, output_hidden_states=True)
        states.append(output.hidden_states[-2])
        pooled.append(output.text_embeds)
    embeds = torch.cat(states, -1)
    return F.pad(embeds, (0, 0, 0, T5_LENGTH)), torch.cat(pooled, -1)


@torch.no_grad()
def _judge(pipeline: StableDiffusion3Pipeline, latents: Tensor, scenes: list[world.Scene]) -> float:
    generator = torch.Generator().manual_seed(1)
    captions = [world.describe(scene) for scene in scenes]
    parts = [slice(start, start + 64) for start in range(0, len(scenes), 64)]
    errors = [_errors(pipeline, latents[part], captions[part], generator) for part in parts]
    return round(torch.cat(errors).mean().item(), 4)
