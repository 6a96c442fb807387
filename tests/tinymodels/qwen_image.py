"""A small QwenImagePipeline, those that edit, and what others made of the same parts are built from."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AddedToken,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessorPil,
)

from dreamlora.families import _qwen_edit
from dreamlora.families._qwen_prompt import AFTER
from tests.tinymodels.flux import unpacked
from tests.tinymodels.tiny import Seen, Tiny, flow

LENGTH = 24
_SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_TEMPLATE_WORDS = (
    *("system", "user", "assistant", "Describe", " the", " image", " by", " detailing", " color", " shape", " size"),
    *(" texture", " quantity", " text", " spatial", " relationships", " of", " objects", " and", " background"),
)


def qwen_tokenizer(words: Sequence[str] = _TEMPLATE_WORDS) -> Qwen2Tokenizer:
    """One token per byte, but for the words of the pipelines' template, which has as many as for the real one."""
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", *sorted(ByteLevel.alphabet())])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_tokens([AddedToken(token, special=True) for token in _SPECIAL], special_tokens=True)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
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
    tokenizer = qwen_tokenizer()
    QwenImagePipeline(tokenizer=tokenizer, **_parts(tokenizer, shift_terminal)).save_pretrained(folder)
    return folder


def _parts(tokenizer: Qwen2Tokenizer, shift_terminal: float | None, **transformer: Any) -> dict[str, Any]:
    torch.manual_seed(0)
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
            image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        )
    )
    denoiser = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(4, 2, 2),
        **transformer,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        max_image_seq_len=8192,
        shift_terminal=shift_terminal,
    )
    return {"scheduler": scheduler, "vae": qwen_vae(), "text_encoder": text_encoder, "transformer": denoiser}


def edit_tokenizer() -> Qwen2Tokenizer:
    """One token per byte, but for the words of the template of those that edit, which has as many as for the real."""
    words = re.findall(r" ?\w+", re.sub(r"<\|.*?\|>", "", _qwen_edit.BEFORE["QwenImageEditPipeline"]))
    return qwen_tokenizer([*dict.fromkeys((*_TEMPLATE_WORDS, *words)), " (", "),", "'s"])


def save_edit(folder: Path, *, pipeline_class: Any, **transformer: Any) -> Path:
    """With a processor as real ones have it, which only torchvision could build."""
    tokenizer = edit_tokenizer()
    parts = _parts(tokenizer, None, **transformer)
    pipeline_class(tokenizer=tokenizer, processor=None, **parts).save_pretrained(folder)
    Qwen2VLImageProcessorPil().save_pretrained(folder / "processor")
    index = folder / "model_index.json"
    told = {**json.loads(index.read_text(encoding="utf-8")), "processor": ["transformers", "Qwen2VLProcessor"]}
    index.write_text(json.dumps(told), encoding="utf-8")
    return folder


def stock_edit(folder: Path) -> Any:
    """The stock pipeline with the processor that takes the place of the real one."""
    processor = _qwen_edit.ImageTextProcessor(
        edit_tokenizer(), Qwen2VLImageProcessorPil.from_pretrained(folder / "processor")
    )
    pipeline = DiffusionPipeline.from_pretrained(folder, processor=None)
    pipeline.register_modules(processor=processor)
    return pipeline


def _embeddings(pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
    embeds, mask = pipeline.encode_prompt(prompts, max_sequence_length=LENGTH)
    return {"prompt_embeds": embeds, "prompt_embeds_mask": torch.ones(embeds.shape[:2]) if mask is None else mask}


def read_call(arguments: Mapping[str, Any], output: Any, sides: tuple[int, int]) -> Seen:
    """Of a transformer over tokens that hold (c, row, column) of 2 x 2 latents."""
    count = sides[0] * sides[1] // 4  # behind these there may be tokens of an image to edit
    tokens = (arguments["hidden_states"], output[0])
    noisy, prediction = (unpacked(packed[:, :count], sides) for packed in tokens)
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


def _edit_embeddings(pipeline: Any, prompts: list[str]) -> dict[str, Tensor]:
    """One by one, as one of the pipelines takes them; cut, which the pipelines do not, as there is no way back."""
    plus = isinstance(pipeline, QwenImageEditPlusPipeline)
    width, height = pipeline_qwenimage_edit.calculate_dimensions(384**2 if plus else 1024**2, 1.0)[:2]
    image = pipeline.image_processor.resize(EDITED, height, width)
    rows = [pipeline.encode_prompt([each], image=[image] if plus else image)[0] for each in ("", *prompts)]
    most = rows[0].shape[1] - len(pipeline.tokenizer(AFTER).input_ids) + LENGTH
    rows = [row[0, :most] for row in rows[1:]]
    masks = [torch.ones(len(row)) for row in rows]
    return {
        "prompt_embeds": pad_sequence(rows, batch_first=True),
        "prompt_embeds_mask": pad_sequence(masks, batch_first=True),
    }


EDITED = Image.fromarray(np.random.default_rng(9).integers(0, 255, (20, 20, 3), dtype=np.uint8))
_EDIT = replace(TINY, stock=stock_edit, edited=EDITED, embeddings=_edit_embeddings)
VARIANTS = {
    "edit": replace(_EDIT, save=partial(save_edit, pipeline_class=QwenImageEditPipeline)),
    "edit_plus": replace(_EDIT, save=partial(save_edit, pipeline_class=QwenImageEditPlusPipeline, zero_cond_t=True)),
}
