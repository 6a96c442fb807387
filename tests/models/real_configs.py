"""Configs as published models have them, from transformers and diffusers of their time: data that must be taken whole.

Those of text encoders name every value that any part of it is made of, in the words of transformers 4: what version 5
calls ``rope_parameters`` stands there as ``rope_theta`` and ``rope_scaling``.
"""

from __future__ import annotations

from typing import Any

_SAVED = {
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
}
_GENERATION = {"bad_words_ids": None, "do_sample": False, "max_length": 20, "top_k": 50, "diversity_penalty": 0.0}
"""Of many more, as versions before 4.50 wrote them into every config."""

QWEN3_4B = {
    **_SAVED,
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "max_position_embeddings": 40960,
    "max_window_layers": 36,
    "model_type": "qwen3",
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
"""Of Z-Image and FLUX.2 klein 4B."""
QWEN3_8B_NEWER = {
    **{name: value for name, value in QWEN3_4B.items() if name != "torch_dtype"},
    "dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "layer_types": ["full_attention"] * 36,
    "tie_word_embeddings": False,
    "transformers_version": "4.57.1",
}
"""Of FLUX.2 klein 9B."""
_QWEN25_TEXT = {
    **_SAVED,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 128000,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
_QWEN25 = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "image_token_id": 151655,
    "model_type": "qwen2_5_vl",
    "tie_word_embeddings": False,
    "video_token_id": 151656,
    "vision_config": {
        "depth": 32,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "hidden_act": "silu",
        "hidden_size": 1280,
        "in_channels": 3,
        "in_chans": 3,
        "intermediate_size": 3420,
        "model_type": "qwen2_5_vl",
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
    },
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
    "vision_token_id": 151654,
}
QWEN25_7B = {**_QWEN25, **_QWEN25_TEXT, "rope_scaling": {"mrope_section": [16, 24, 24], "type": "mrope"}}
"""As it was published, with the text model's values beside the others."""
QWEN_IMAGE = {
    **_QWEN25,
    **_QWEN25_TEXT,
    "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
    "text_config": {
        **_QWEN25_TEXT,
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "image_token_id": None,
        "layer_types": ["full_attention"] * 28,
        "model_type": "qwen2_5_vl_text",
        "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
        "sliding_window": None,
        "vision_token_id": 151654,
    },
}
"""As the pipelines have it: both beside and inside."""
QWEN3_VL_4B = {
    "architectures": ["Qwen3VLForConditionalGeneration"],
    "image_token_id": 151655,
    "model_type": "qwen3_vl",
    "text_config": {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "dtype": "bfloat16",
        "eos_token_id": 151645,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2560,
        "initializer_range": 0.02,
        "intermediate_size": 9728,
        "max_position_embeddings": 262144,
        "model_type": "qwen3_vl_text",
        "num_attention_heads": 32,
        "num_hidden_layers": 36,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "rope_theta": 5000000,
        "tie_word_embeddings": True,
        "use_cache": True,
        "vocab_size": 151936,
    },
    "tie_word_embeddings": True,
    "transformers_version": "4.57.0.dev0",
    "video_token_id": 151656,
    "vision_config": {
        "deepstack_visual_indexes": [5, 11, 17],
        "depth": 24,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 1024,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 4096,
        "model_type": "qwen3_vl",
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "out_hidden_size": 2560,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": 151653,
    "vision_start_token_id": 151652,
}
"""Of Krea 2."""
MISTRAL_SMALL = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "dtype": "bfloat16",
    "image_token_index": 10,
    "model_type": "mistral3",
    "multimodal_projector_bias": False,
    "projector_hidden_act": "gelu",
    "spatial_merge_size": 2,
    "text_config": {
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "initializer_range": 0.02,
        "intermediate_size": 32768,
        "max_position_embeddings": 131072,
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000000.0,
        "sliding_window": None,
        "use_cache": True,
        "vocab_size": 131072,
    },
    "transformers_version": "4.57.1",
    "vision_config": {
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 1024,
        "image_size": 1540,
        "initializer_range": 0.02,
        "intermediate_size": 4096,
        "model_type": "pixtral",
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "rope_theta": 10000.0,
    },
    "vision_feature_layer": -1,
}
"""Of FLUX.2 dev."""
GEMMA_2_2B = {
    **_SAVED,
    "architectures": ["Gemma2Model"],
    "attention_bias": False,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 107],
    "final_logit_softcapping": 30.0,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "max_position_embeddings": 8192,
    "model_type": "gemma2",
    "num_attention_heads": 8,
    "num_hidden_layers": 26,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "vocab_size": 256000,
}
"""Of Sana and Lumina 2."""
LLAMA_8B = {
    **_SAVED,
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "output_attentions": True,
    "output_hidden_states": True,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
"""Of HiDream."""
T5_XXL = {
    **_GENERATION,
    "_name_or_path": "google/t5-v1_1-xxl",
    "architectures": ["T5EncoderModel"],
    "classifier_dropout": 0.0,
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.3",
    "use_cache": True,
    "vocab_size": 32128,
}
"""Of SD 3, FLUX.1, Chroma and HiDream."""
PILE_T5_XL = {
    **{name: value for name, value in T5_XXL.items() if name != "output_past"},
    "architectures": ["UMT5EncoderModel"],
    "d_ff": 5120,
    "d_model": 2048,
    "eos_token_id": 2,
    "is_decoder": False,
    "model_type": "umt5",
    "num_heads": 32,
    "pad_token_id": 1,
    "scalable_attention": True,
    "tokenizer_class": "LlamaTokenizerFast",
}
"""Of AuraFlow."""
OPENCLIP_BIG_G = {
    "_name_or_path": "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
    "architectures": ["CLIPTextModelWithProjection"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "gelu",
    "hidden_size": 1280,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 5120,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "pad_token_id": 1,
    "projection_dim": 1280,
    "torch_dtype": "float16",
    "transformers_version": "4.32.0.dev0",
    "vocab_size": 49408,
}
"""Of SDXL and SD 3."""

ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3 4B": ("Qwen3Config", QWEN3_4B),
    "Qwen3 8B, newer": ("Qwen3Config", QWEN3_8B_NEWER),
    "Qwen2.5-VL 7B": ("Qwen2_5_VLConfig", QWEN25_7B),
    "Qwen-Image": ("Qwen2_5_VLConfig", QWEN_IMAGE),
    "Qwen3-VL 4B": ("Qwen3VLConfig", QWEN3_VL_4B),
    "Mistral Small": ("Mistral3Config", MISTRAL_SMALL),
    "Gemma 2 2B": ("Gemma2Config", GEMMA_2_2B),
    "Llama 3.1 8B": ("LlamaConfig", LLAMA_8B),
    "T5 XXL": ("T5Config", T5_XXL),
    "Pile-T5 XL": ("UMT5Config", PILE_T5_XL),
    "OpenCLIP bigG": ("CLIPTextConfig", OPENCLIP_BIG_G),
}

_SIX = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
_DEEP = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in {
        "block_types": _SIX,
        "block_out_channels": [128, 256, 512, 512, 1024, 1024],
        "layers_per_block": [3] * 6,
        "qkv_multiscales": [[], [], [], [5], [5], [5]],
    }.items()
}
_FOUR = {
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "force_upcast": True,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_add_attention": True,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 1024,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "FLUX.1's autoencoder": (
        "AutoencoderKL",
        {
            **_FOUR,
            **{"latent_channels": 16, "latents_mean": None, "latents_std": None, "scaling_factor": 0.3611},
            **{"shift_factor": 0.1159, "use_post_quant_conv": False, "use_quant_conv": False},
        },
    ),
    "FLUX.2's autoencoder": (
        "AutoencoderKLFlux2",
        {
            **_FOUR,
            **{"latent_channels": 32, "batch_norm_eps": 0.0001, "batch_norm_momentum": 0.1, "patch_size": [2, 2]},
            **{"use_post_quant_conv": True, "use_quant_conv": True},
        },
    ),
    "Qwen-Image's autoencoder": (
        "AutoencoderKLQwenImage",
        {
            **{"attn_scales": [], "base_dim": 96, "dim_mult": [1, 2, 4, 4], "dropout": 0.0, "num_res_blocks": 2},
            **{"latents_mean": [-0.7571, 2.0743] * 8, "latents_std": [2.8184, 1.916] * 8, "z_dim": 16},
            "temperal_downsample": [False, True, True],
        },
    ),
    "Sana's autoencoder": (
        "AutoencoderDC",
        {
            **_DEEP,
            **{"attention_head_dim": 32, "decoder_act_fns": "silu", "decoder_norm_types": "rms_norm"},
            **{"downsample_block_type": "Conv", "upsample_block_type": "interpolate", "in_channels": 3},
            **{"latent_channels": 32, "scaling_factor": 0.41407, "encoder_block_types": "ResBlock"},
        },
    ),
    "SDXL": (
        "UNet2DConditionModel",
        {
            **{"addition_embed_type": "text_time", "addition_embed_type_num_heads": 64, "addition_time_embed_dim": 256},
            **{"attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "class_embed_type": None},
            **{"cross_attention_dim": 2048, "attention_type": "default", "encoder_hid_dim_type": None},
            **{"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]},
            **{"mid_block_type": "UNetMidBlock2DCrossAttn", "num_attention_heads": None, "sample_size": 128},
            **{"projection_class_embeddings_input_dim": 2816, "transformer_layers_per_block": [1, 2, 10]},
            **{"up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "upcast_attention": None},
            **{"reverse_transformer_layers_per_block": None, "use_linear_projection": True},
        },
    ),
    "SD 3.5 medium": (
        "SD3Transformer2DModel",
        {
            **{"attention_head_dim": 64, "caption_projection_dim": 1536, "dual_attention_layers": list(range(13))},
            **{"in_channels": 16, "joint_attention_dim": 4096, "num_attention_heads": 24, "num_layers": 24},
            **{"out_channels": 16, "patch_size": 2, "pooled_projection_dim": 2048, "pos_embed_max_size": 384},
            **{"qk_norm": "rms_norm", "sample_size": 128},
        },
    ),
    "FLUX.2 dev": (
        "Flux2Transformer2DModel",
        {
            **{"attention_head_dim": 128, "axes_dims_rope": [32, 32, 32, 32], "eps": 1e-06, "in_channels": 128},
            **{"joint_attention_dim": 15360, "mlp_ratio": 3.0, "num_attention_heads": 48, "num_layers": 8},
            **{"num_single_layers": 48, "out_channels": None, "patch_size": 1, "rope_theta": 2000},
            "timestep_guidance_channels": 256,
        },
    ),
    "Z-Image": (
        "ZImageTransformer2DModel",
        {
            **{"all_f_patch_size": [1], "all_patch_size": [2], "axes_dims": [32, 48, 48], "cap_feat_dim": 2560},
            **{"axes_lens": [1536, 512, 512], "dim": 3840, "in_channels": 16, "n_heads": 30, "n_kv_heads": 30},
            **{"n_layers": 30, "n_refiner_layers": 2, "norm_eps": 1e-05, "qk_norm": True, "rope_theta": 256.0},
            "t_scale": 1000.0,
        },
    ),
    "Qwen-Image": (
        "QwenImageTransformer2DModel",
        {
            **{"attention_head_dim": 128, "axes_dims_rope": [16, 56, 56], "guidance_embeds": False, "in_channels": 64},
            **{"joint_attention_dim": 3584, "num_attention_heads": 24, "num_layers": 60, "out_channels": 16},
            **{"patch_size": 2, "zero_cond_t": True},
        },
    ),
    "Sana": (
        "SanaTransformer2DModel",
        {
            **{"attention_bias": False, "attention_head_dim": 32, "caption_channels": 2304, "num_layers": 20},
            **{"cross_attention_dim": 2240, "cross_attention_head_dim": 112, "dropout": 0.0, "in_channels": 32},
            **{"interpolation_scale": None, "mlp_ratio": 2.5, "norm_elementwise_affine": False, "norm_eps": 1e-06},
            **{"num_attention_heads": 70, "num_cross_attention_heads": 20, "out_channels": 32, "patch_size": 1},
            **{"sample_size": 32, "guidance_embeds": False, "qk_norm": None, "timestep_scale": 1.0},
        },
    ),
    "Qwen-Image's scheduler": (
        "FlowMatchEulerDiscreteScheduler",
        {
            **{"base_image_seq_len": 256, "base_shift": 0.5, "invert_sigmas": False, "max_image_seq_len": 8192},
            **{"max_shift": 0.9, "num_train_timesteps": 1000, "shift": 1.0, "shift_terminal": 0.02},
            **{"stochastic_sampling": False, "time_shift_type": "exponential", "use_beta_sigmas": False},
            **{"use_dynamic_shifting": True, "use_exponential_sigmas": False, "use_karras_sigmas": False},
        },
    ),
}
"""Of diffusers."""
