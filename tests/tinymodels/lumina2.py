"""A small Lumina2Pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tests.tinymodels.chat import gemma2, gemma_tokenizer, outspoken
from tests.tinymodels.tiny import Seen, Tiny, flow

LENGTH = 256


def save(folder: Path, *, shift: float = 6.0) -> Path:
    """For 32 x 32 pixels (latents 4 x 4 x 4): the pipeline takes eight pixels of a side to be one latent."""
    torch.manual_seed(0)
    tokenizer = gemma_tokenizer()
    transformer = Lumina2Transformer2DModel(
        sample_size=4,
        in_channels=4,
        hidden_size=32,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(8, 4, 4),
        axes_lens=(300, 32, 32),
        cap_feat_dim=16,
    )
    Lumina2Pipeline(
        transformer=outspoken(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=_vae(),
        text_encoder=gemma2(tokenizer),
        tokenizer=tokenizer,
    ).save_pretrained(folder)
    return folder


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(4, 4, 4, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=2,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _embeddings(pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
    embeds, mask, _, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    longest = int(mask.sum(1).max())
    return {
        "prompt_embeds": pad_sequence([row[own.bool()] for row, own in zip(embeds, mask, strict=True)], True),
        "prompt_attention_mask": mask[:, :longest],
    }


def _read_call(arguments: Mapping[str, Any], output: Any, sides: tuple[int, int]) -> Seen:
    return Seen(arguments["hidden_states"], 1 - arguments["timestep"], -output[0])


TINY = Tiny(
    save=save,
    embeddings=_embeddings,
    read_call=_read_call,
    recipe=flow,
    default_side=lambda pipeline: pipeline.default_image_size,
    prompt_limit=LENGTH,
    side=32,
    latents=(4, 4, 4),
)
