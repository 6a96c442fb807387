"""A small random model, or tokenizer, of every class that parts of pipelines have; by class, without a download."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn

VOCABULARY = 40
_WIDTH = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
LANGUAGE = {**_WIDTH, "vocab_size": VOCABULARY, "num_key_value_heads": 2, "head_dim": 8}
_SEEING = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
_T5 = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
_CLIP = {**_WIDTH, "vocab_size": VOCABULARY, "max_position_embeddings": 8, "projection_dim": 8}
_ANGLES = {"rope_type": "default", "rope_theta": 5_000_000.0}


def clip_config() -> Any:
    """Of a CLIP that sees as well."""
    seeing = {**_WIDTH, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4, "projection_dim": 8}
    return transformers.CLIPConfig(text_config=_CLIP, vision_config=seeing, projection_dim=8)


def qwen3_config(**values: Any) -> Any:
    """With other angles than the class's own."""
    return transformers.Qwen3Config(**LANGUAGE, rope_parameters={**_ANGLES, "rope_theta": 1e6}, **values)


def qwen25_config() -> Any:
    """With its three kinds of positions."""
    text = {name: value for name, value in LANGUAGE.items() if name != "head_dim"}
    text["rope_parameters"] = {**_ANGLES, "mrope_section": [1, 1, 2]}
    return transformers.Qwen2_5_VLConfig(text_config=text, vision_config=_SEEING)


def qwen3vl_config() -> Any:
    """With its three kinds of positions."""
    text = {**LANGUAGE, "rope_parameters": {**_ANGLES, "mrope_section": [2, 1, 1], "mrope_interleaved": True}}
    seeing = {**_SEEING, "num_position_embeddings": 4, "deepstack_visual_indexes": [0]}
    return transformers.Qwen3VLConfig(text_config=text, vision_config=seeing)


def mistral_config() -> Any:
    """Whose two models inside are of classes that a config of this kind may choose."""
    text = {**LANGUAGE, "model_type": "mistral", "rope_parameters": {**_ANGLES, "rope_theta": 1e9}}
    seeing = {**_WIDTH, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14, "model_type": "pixtral"}
    return transformers.Mistral3Config(text_config=text, vision_config=seeing, image_token_index=1)


def gemma_config() -> Any:
    """Of its second version."""
    return transformers.Gemma2Config(**LANGUAGE, sliding_window=8, pad_token_id=0, eos_token_id=1, bos_token_id=2)


ENCODERS: dict[str, Callable[[], Any]] = {
    "CLIPTextModel": lambda: transformers.CLIPTextConfig(**_CLIP),
    "CLIPTextModelWithProjection": lambda: transformers.CLIPTextConfig(**_CLIP),
    "T5EncoderModel": lambda: transformers.T5Config(**_T5, feed_forward_proj="gated-gelu"),
    "UMT5EncoderModel": lambda: transformers.UMT5Config(**_T5),
    "Qwen3ForCausalLM": qwen3_config,
    "Qwen3Model": qwen3_config,
    "Qwen2_5_VLForConditionalGeneration": qwen25_config,
    "Qwen3VLModel": qwen3vl_config,
    "Mistral3ForConditionalGeneration": mistral_config,
    "Gemma2Model": gemma_config,
    "LlamaForCausalLM": lambda: transformers.LlamaConfig(**LANGUAGE, rope_parameters={**_ANGLES, "rope_theta": 5e5}),
}
"""Configs of text encoders."""

_LEVELS = {"block_out_channels": (4, 8), "norm_num_groups": 2, "sample_size": 16, "latent_channels": 4}
_BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
_HEADS = {"num_attention_heads": 2, "attention_head_dim": 8}
_WIDE = {"num_attention_heads": 2, "attention_head_dim": 16}
_DEEP = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in {
        "block_types": ("ResBlock", "EfficientViTBlock"),
        "block_out_channels": (8, 8),
        "layers_per_block": (1, 1),
        "qkv_multiscales": ((), (5,)),
    }.items()
}

MODELS: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {**_LEVELS, **_BLOCKS, "shift_factor": 0.1, "use_quant_conv": False},
    "AutoencoderKLFlux2": {**_LEVELS, **_BLOCKS, "layers_per_block": 1},
    "AutoencoderKLQwenImage": {
        **{"base_dim": 4, "z_dim": 2, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [True]},
        **{"latents_mean": [0.1] * 2, "latents_std": [1.1] * 2},
    },
    "AutoencoderDC": {**_DEEP, "in_channels": 3, "latent_channels": 4, "attention_head_dim": 2},
    "UNet2DConditionModel": {
        **{"block_out_channels": (4, 8), "norm_num_groups": 2, "layers_per_block": 1, "cross_attention_dim": 8},
        **{"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": (2, 4)},
        **{"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "transformer_layers_per_block": (1, 1)},
        **{"addition_embed_type": "text_time", "addition_time_embed_dim": 8},
        "projection_class_embeddings_input_dim": 64,
    },
    "SD3Transformer2DModel": {
        **_HEADS,
        **{"sample_size": 8, "in_channels": 4, "num_layers": 2, "joint_attention_dim": 16, "pos_embed_max_size": 8},
        **{"caption_projection_dim": 16, "pooled_projection_dim": 8, "qk_norm": "rms_norm"},
        "dual_attention_layers": (0,),
    },
    "FluxTransformer2DModel": {
        **_WIDE,
        **{"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 8},
        **{"pooled_projection_dim": 8, "axes_dims_rope": (4, 4, 8), "guidance_embeds": True},
    },
    "Flux2Transformer2DModel": {
        **_WIDE,
        **{"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 48},
        "axes_dims_rope": (4, 4, 4, 4),
    },
    "ZImageTransformer2DModel": {
        **{"in_channels": 4, "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2},
        **{"cap_feat_dim": 16, "axes_dims": [8, 4, 4], "axes_lens": [32, 32, 32]},
    },
    "QwenImageTransformer2DModel": {
        **_WIDE,
        **{"in_channels": 16, "out_channels": 4, "num_layers": 1, "joint_attention_dim": 16},
        "axes_dims_rope": (8, 4, 4),
    },
    "SanaTransformer2DModel": {
        **_HEADS,
        **{"patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 1, "sample_size": 8},
        **{"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16},
        "caption_channels": 16,
    },
    "Krea2Transformer2DModel": {
        **{"in_channels": 16, "num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "num_text_layers": 3},
        **{"num_key_value_heads": 1, "intermediate_size": 16, "timestep_embed_dim": 8, "text_hidden_dim": 16},
        **{"text_num_attention_heads": 2, "text_num_key_value_heads": 1, "text_intermediate_size": 16},
        **{"num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1, "axes_dims_rope": (4, 2, 2)},
    },
    "Ideogram4Transformer2DModel": {
        **_WIDE,
        **{"in_channels": 16, "num_layers": 1, "intermediate_size": 16, "adaln_dim": 8, "llm_features_dim": 16},
        "mrope_section": (4, 2, 2),
    },
    "Lumina2Transformer2DModel": {
        **{"sample_size": 4, "in_channels": 4, "hidden_size": 16, "num_layers": 1, "num_refiner_layers": 1},
        **{"num_attention_heads": 2, "num_kv_heads": 2, "multiple_of": 16, "cap_feat_dim": 16},
        **{"axes_dim_rope": [4, 2, 2], "axes_lens": [32, 32, 32]},
    },
    "ChromaTransformer2DModel": {
        **_WIDE,
        **{"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 16},
        **{"axes_dims_rope": (4, 4, 8), "approximator_hidden_dim": 16, "approximator_layers": 1},
        "approximator_num_channels": 16,
    },
    "AuraFlowTransformer2DModel": {
        **_HEADS,
        **{"sample_size": 8, "in_channels": 4, "num_mmdit_layers": 1, "num_single_dit_layers": 1},
        **{"caption_projection_dim": 16, "joint_attention_dim": 16, "pos_embed_max_size": 16},
    },
    "HiDreamImageTransformer2DModel": {
        **{"patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_single_layers": 1},
        **{"attention_head_dim": 8, "num_attention_heads": 2, "caption_channels": [16, 16], "text_emb_dim": 8},
        **{"num_routed_experts": 2, "num_activated_experts": 1, "axes_dims_rope": (4, 2, 2)},
        **{"max_resolution": (32, 32), "llama_layers": (0, 1)},
    },
}
"""Arguments of denoisers and autoencoders."""


def part_class(name: str) -> Any:
    """The class, of whichever library has it."""
    return getattr(transformers if name in ENCODERS else diffusers, name)


def model(name: str) -> nn.Module:
    """Random, and every number finite: some classes leave what they were given."""
    torch.manual_seed(0)
    owner = part_class(name)
    made: nn.Module = owner(ENCODERS[name]()) if name in ENCODERS else owner(**MODELS[name])
    with torch.no_grad():
        for tensor in [*made.parameters(), *(own for own in made.buffers() if own.is_floating_point())]:
            if not tensor.isfinite().all() or not tensor.any():
                tensor.normal_(0, 0.02)
        for key, tensor in made.named_buffers():
            if key.startswith("bn."):  # not what a new one has
                tensor.copy_(tensor + 1)
    return made


LETTERS = "abcdefghijklmnopqrstuvwxyz"
_MARKS = ("<|im_start|>", "<|im_end|>", "<|image_pad|>")


def qwen_tokenizer() -> Any:
    """One token per byte."""
    vocabulary = {token: i for i, token in enumerate(["<|endoftext|>", *sorted(ByteLevel.alphabet())])}
    tokenizer = transformers.Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_tokens([transformers.AddedToken(mark, special=True) for mark in _MARKS], special_tokens=True)
    return tokenizer


def t5_tokenizer() -> Any:
    """One token per letter."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)]
    return transformers.T5TokenizerFast(vocab=pieces, extra_ids=0)


def gemma_tokenizer() -> Any:
    """One token per letter."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    return transformers.GemmaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])


def llama_tokenizer() -> Any:
    """One token per letter."""
    tokens = ["<unk>", "<s>", "</s>", "▁", *LETTERS]
    return transformers.LlamaTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], pad_token="</s>")


def clip_tokenizer() -> Any:
    """One token per byte, two with those at ends of words."""
    bytes_ = sorted(ByteLevel.alphabet())
    tokens = [*bytes_, *(byte + "</w>" for byte in bytes_), "<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, model_max_length=8)


TOKENIZERS: dict[str, Callable[[], Any]] = {
    **dict.fromkeys(("CLIPTokenizer", "CLIPTokenizerFast"), clip_tokenizer),
    **dict.fromkeys(("T5Tokenizer", "T5TokenizerFast"), t5_tokenizer),
    **dict.fromkeys(("Qwen2Tokenizer", "Qwen2TokenizerFast"), qwen_tokenizer),
    **dict.fromkeys(("GemmaTokenizer", "GemmaTokenizerFast"), gemma_tokenizer),
    **dict.fromkeys(("LlamaTokenizer", "LlamaTokenizerFast"), llama_tokenizer),
    "PreTrainedTokenizerFast": qwen_tokenizer,
}
