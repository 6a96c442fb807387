"""A small SanaPipeline."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
from torch import Tensor

from tests.tinymodels.chat import gemma2, gemma_tokenizer
from tests.tinymodels.tiny import Seen, Tiny, flow

LENGTH = 16
INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


def dc_vae() -> AutoencoderDC:
    """Eight pixels of a side are one latent."""
    kinds, widths = ("ResBlock",) * 3 + ("EfficientViTBlock",), (4, 4, 4, 8)
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        encoder_layers_per_block=(1,) * 4,
        decoder_layers_per_block=(1,) * 4,
        encoder_qkv_multiscales=((), (), (), (5,)),
        decoder_qkv_multiscales=((), (), (), (5,)),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )


def save(folder: Path, **more: Any) -> Path:
    """For 64 x 64 pixels (latents 4 x 8 x 8), with the scheduler that the published models have."""
    torch.manual_seed(0)
    tokenizer = gemma_tokenizer()
    transformer = SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        sample_size=8,
    )
    scheduler = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    parts = {
        "tokenizer": tokenizer,
        "text_encoder": gemma2(tokenizer),
        "vae": dc_vae(),
        "transformer": transformer,
        "scheduler": scheduler,
    }
    SanaPipeline(**{**parts, **more}).save_pretrained(folder)
    return folder


def embeddings(pipeline: Any, prompts: list[str], instruction: list[str] | None = INSTRUCTION) -> dict[str, Tensor]:
    """Without the padding that all prompts have."""
    embeds, mask, _, _ = pipeline.encode_prompt(
        prompts,
        do_classifier_free_guidance=False,
        max_sequence_length=LENGTH,
        complex_human_instruction=instruction,
    )
    longest = int(mask.sum(1).max())
    return {
        "prompt_embeds": (embeds * mask[..., None])[:, :longest],
        "prompt_attention_mask": mask[:, :longest],
    }


def _read_call(arguments: Mapping[str, Any], output: Any, sides: tuple[int, int]) -> Seen:
    return Seen(arguments["hidden_states"], arguments["timestep"] / 1000, output[0])


def _moments(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    mean = vae.encode(pixels).latent * vae.config.scaling_factor
    return mean, torch.zeros_like(mean)


TINY = Tiny(
    save=save,
    embeddings=embeddings,
    read_call=_read_call,
    recipe=flow,
    default_side=lambda pipeline: pipeline.transformer.config.sample_size * pipeline.vae_scale_factor,
    moments=_moments,
    decoded=lambda pipeline, vae, latents: vae.decode(latents / vae.config.scaling_factor).sample,
    round_trip=lambda vae, pixels: vae.decode(vae.encode(pixels).latent).sample,
    call={"max_sequence_length": LENGTH},
    length=LENGTH,
    prompt_limit=LENGTH,
    side=64,
)
