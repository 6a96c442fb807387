"""A small ZImagePipeline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tests.tinymodels.chat import outspoken, qwen3, qwen_tokenizer
from tests.tinymodels.parts import kl_vae
from tests.tinymodels.tiny import Seen, Tiny, flow

LENGTH = 64


def save(folder: Path, *, shift: float = 6.0) -> Path:
    """Latents have 4 channels; two pixels of a side are one of their places."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[8, 4, 4],
        axes_lens=[600, 32, 32],
    )
    with torch.no_grad():  # zeros would hide what is padding
        transformer.x_pad_token.normal_()
        transformer.cap_pad_token.normal_()
    ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        vae=kl_vae(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=qwen3(tokenizer),
        tokenizer=tokenizer,
        transformer=outspoken(transformer),
    ).save_pretrained(folder)
    return folder


def _embeddings(pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
    # a copy of the prompts: the pipeline writes its own into the list
    rows, _ = pipeline.encode_prompt([*prompts], do_classifier_free_guidance=False, max_sequence_length=LENGTH)
    masks = [torch.ones(len(row), dtype=torch.long) for row in rows]
    return {
        "prompt_embeds": pad_sequence(rows, batch_first=True),
        "prompt_embeds_mask": pad_sequence(masks, batch_first=True),
    }


def _read_call(arguments: Mapping[str, Any], output: Any, sides: tuple[int, int]) -> Seen:
    half = len(arguments["x"]) // 2  # behind them are the same latents with the negative prompts
    noisy, velocity = (torch.cat(frames[:half], dim=1).transpose(0, 1) for frames in (arguments["x"], output[0]))
    return Seen(noisy, 1 - arguments["t"][:half], -velocity)


TINY = Tiny(
    save=save,
    embeddings=_embeddings,
    read_call=_read_call,
    recipe=flow,
    default_side=lambda pipeline: 1024,
    prompt_limit=LENGTH,
    call={"max_sequence_length": LENGTH},
    length=LENGTH,
)
