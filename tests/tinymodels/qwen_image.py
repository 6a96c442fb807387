"""A small QwenImagePipeline, and what others made of the same parts are built from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import AddedToken, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from tests.tinymodels.flux import unpacked
from tests.tinymodels.tiny import Seen, Tiny, flow

LENGTH = 24
_SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_TEMPLATE_WORDS = (
    *("system", "user", "assistant", "Describe", " the", " image", " by", " detailing", " color", " shape", " size"),
    *(" texture", " quantity", " text", " spatial", " relationships", " of", " objects", " and", " background"),
)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """One token per byte, but for the words of the pipelines' template, which has as many as for the real one."""
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", *sorted(ByteLevel.alphabet())])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_tokens([AddedToken(token, special=True) for token in _SPECIAL], special_tokens=True)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in _TEMPLATE_WORDS])
    return tokenizer


def qwen_vae() -> AutoencoderKLQwenImage:
    """Two pixels of a side are one latent."""
    return AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.1, 0.9, 0.6, 1.5],
    )


def save(folder: Path, *, shift_terminal: float | None = None) -> Path:
    """Latents have 4 channels; two pixels of a side are one of their places. The real scheduler has a last sigma of
    0.02, and so cannot draw in one step.
    """
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    text_encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer),
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            },
            vision_config={
                "depth": 1,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_heads": 2,
                "out_hidden_size": 16,
            },
        )
    )
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 2, 2),
    )
    QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            max_image_seq_len=8192,
            shift_terminal=shift_terminal,
        ),
        vae=qwen_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(folder)
    return folder


def _embeddings(pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
    embeds, mask = pipeline.encode_prompt(prompts, max_sequence_length=LENGTH)
    return {"prompt_embeds": embeds, "prompt_embeds_mask": torch.ones(embeds.shape[:2]) if mask is None else mask}


def read_call(arguments: Mapping[str, Any], output: Any, sides: tuple[int, int]) -> Seen:
    """Of a transformer over tokens that hold (c, row, column) of 2 x 2 latents."""
    noisy, prediction = (unpacked(packed, sides) for packed in (arguments["hidden_states"], output[0]))
    return Seen(noisy, arguments["timestep"].expand(len(noisy)), prediction)


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(vae.config[name]) for name in ("latents_mean", "latents_std"))
    return mean[:, None, None], std[:, None, None]


def moments(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``[B, C, h, w]`` of the posterior, each channel normalised by its statistics."""
    posterior = vae.encode(pixels[:, :, None]).latent_dist
    mean, std = _statistics(vae)
    return (posterior.mean[:, :, 0] - mean) / std, posterior.std[:, :, 0] / std


def decoded(pipeline: Any, vae: Any, latents: Tensor) -> Tensor:
    """Pixels of latents, as the pipeline decodes them."""
    mean, std = _statistics(vae)
    return vae.decode((latents * std + mean)[:, :, None]).sample[:, :, 0]


def round_trip(vae: Any, pixels: Tensor) -> Tensor:
    """Pixels after encoding and decoding by the autoencoder alone."""
    return vae.decode(vae.encode(pixels[:, :, None]).latent_dist.mode()).sample[:, :, 0]


TINY = Tiny(
    save=save,
    embeddings=_embeddings,
    read_call=read_call,
    recipe=flow,
    default_side=lambda pipeline: pipeline.default_sample_size * pipeline.vae_scale_factor,
    moments=moments,
    decoded=decoded,
    round_trip=round_trip,
    prompt_limit=LENGTH,
    call={"max_sequence_length": LENGTH},
    length=LENGTH,
    idle=("blocks.1.attn.to_add_out", "blocks.1.txt_mlp"),
)
