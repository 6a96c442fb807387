"""Flags of diffusers' training scripts (and a few of other trainers) that have no option here, and what to do instead.

Together with the options of ``config`` this covers every flag of ``train_dreambooth_lora.py`` and
``train_text_to_image_lora.py``.
"""

from __future__ import annotations

ELSEWHERE: dict[str, str] = {
    # train_dreambooth_lora.py
    "use_8bit_adam": "use --optimizer adamw8bit",
    "tokenizer_name": "the tokenizer is always the pipeline's own (folder tokenizer/)",
    "text_encoder_use_attention_mask": "only DeepFloyd IF needs it, which is not supported",
    "class_labels_conditioning": "only DeepFloyd IF's upscaler needs it, which is not supported",
    # its SDXL and Flux relatives
    "do_edm_style_training": "EDM training is not supported; models train with the objective of their own scheduler",
    "output_kohya_format": "kohya's file format is not written. diffusers loads what is; ComfyUI loads FLUX's, "
    "but no attention layer of a Stable Diffusion UNet, and takes alpha for the rank (leave --lora_alpha out for it)",
    "prodigy_beta3": "use --optimizer_args beta3 and its value",
    "prodigy_decouple": "use --optimizer_args decouple true (the default) or false",
    "prodigy_use_bias_correction": "use --optimizer_args use_bias_correction true (the default) or false",
    "prodigy_safeguard_warmup": "use --optimizer_args safeguard_warmup true (the default) or false",
    "use_dora": "use --adapter dora",
    "train_text_encoder_ti": "use --new_tokens with the word to start from (sks=dog); sks stands in the captions then",
    "train_text_encoder_ti_frac": "use --new_tokens_end and a share of the run, such as 0.5",
    "token_abstraction": "use --new_tokens with the word to start from (sks=dog); sks stands in the captions then",
    "num_new_tokens_per_abstraction": "use --new_tokens with the number of vectors (sks:2=dog)",
    "initializer_concept": "use --new_tokens with the word to start from (sks=dog)",
    "enable_npu_flash_attention": "NPU attention is not supported",
    "bnb_quantization_config_path": "use --base_precision nf4, or int8",
    "do_fp8_training": "use --base_precision fp8, which halves the weights; it is computed in --mixed_precision",
    "skip_final_inference": "use --sample_steps 0 for no samples at all",
    "final_validation_prompt": "use --validation_prompt; it is drawn at the end as well",
    "aspect_ratio_buckets": "use --buckets; the sizes follow from --resolution and --bucket_step",
    "use_aspect_ratio_buckets": "use --buckets",
    "remote_text_encoder": "the text encoder always runs here; unless it trains, it is freed before the denoiser is "
    "loaded",
    "fsdp_text_encoder": "sharding (FSDP) is not supported yet; of several GPUs each holds the whole model",
    # other trainers, and what people type first
    "lr": "use --learning_rate",
    "unet_lr": "use --learning_rate",
    "optimizer_type": "use --optimizer; there are: {optimizers}",
    "loraplus_lr_ratio": "use --optimizer lora_plus --optimizer_args ratio and its value",
    "loraplus_unet_lr_ratio": "use --optimizer lora_plus --optimizer_args ratio and its value",
    "loraplus_text_encoder_lr_ratio": "use --optimizer lora_plus --optimizer_args ratio and its value",
    "optimizer_schedulefree_wrapper": "use --optimizer schedulefree_adamw",
    "steps": "use --max_train_steps",
    "epochs": "use --num_train_epochs",
    "batch_size": "use --train_batch_size",
    "model": "use --pretrained_model_name_or_path",
    "network_dim": "use --rank",
    "network_weights": "use --init_lora",
    "dim_from_weights": "leave it out: --init_lora takes ranks, alphas and layers from its file",
    "min_snr_gamma": "use --snr_gamma",
    "v_parameterization": "use --prediction_type v_prediction",
    "zero_terminal_snr": "use --rescale_betas_zero_snr",
    "discrete_flow_shift": "use --timestep_shift",
    "masked_loss": "use --mask_data_dir and a folder of masks, or --alpha_mask",
    "network_alpha": "use --lora_alpha",
    "placeholder_token": "use --new_tokens with the word to start from (sks=dog)",
    "initializer_token": "use --new_tokens with the word to start from (sks=dog)",
    "num_vectors": "use --new_tokens with the number of vectors (sks:2=dog)",
    "token_string": "use --new_tokens with the word to start from (sks=dog)",
    "init_word": "use --new_tokens with the word to start from (sks=dog)",
    "num_vectors_per_token": "use --new_tokens with the number of vectors (sks:2=dog)",
    "network_module": "use --adapter; there are: {adapters}",
    "network_args": "use --adapter_args for settings of LoHa and LoKr, --rank_pattern and --alpha_pattern for other "
    "ranks of some layers, --lora_layers and --lora_blocks for which layers",
    "network_dropout": "use --lora_dropout",
    "target_modules": "use --lora_layers",
    "layers_to_transform": "use --lora_blocks",
    "use_ema": "use --ema_decay and a decay, such as 0.999",
    "ema_max_decay": "use --ema_decay",
    "ema_inv_gamma": "the warm-up of --ema_decay has no settings",
    "offload_ema": "the moving average stays on the device: it is as small as the LoRA",
    "ema_power": "the warm-up of --ema_decay has no settings",
    # memory and speed: kohya's sd-scripts and musubi-tuner
    "fp8_base": "use --base_precision fp8",
    "fp8_base_unet": "use --base_precision fp8 alone",
    "fp8_scaled": "use --base_precision fp8, which has a scale for every row",
    **dict.fromkeys(
        ("fp8_t5", "fp8_llm", "fp8_vl", "fp8_te", "fp8_text_encoder", "fp8_gemma2"), "use --text_encoder_precision fp8"
    ),
    **dict.fromkeys(("full_bf16", "full_fp16"), "use --mixed_precision; LoRA and optimizer stay float32"),
    **dict.fromkeys(
        ("blocks_to_swap", "double_blocks_to_swap", "single_blocks_to_swap", "enable_block_swap"),
        "use --offload_blocks and the number of blocks",
    ),
    "cpu_offload_checkpointing": "use --gradient_checkpointing and --offload_blocks",
    **dict.fromkeys(("lowram", "highvram", "lowvram"), "use --vram and the gigabytes of the GPU, or --vram auto"),
    **dict.fromkeys(
        ("sdpa", "mem_eff_attn"), "torch's own attention is always used, unless --attention_backend names another"
    ),
    "xformers": "use --attention_backend xformers",
    "flash_attn": "use --attention_backend flash",
    "sage_attn": "sage attention has no backward pass: use --attention_backend for another",
    **dict.fromkeys(("flash3", "attn_mode"), "use --attention_backend"),
    "torch_compile": "use --compile",
    "vae_batch_size": "leave it out: images are encoded one after the other, and once",
    "no_half_vae": "leave it out: the autoencoder is always float32",
    # ai-toolkit
    "quantize": "use --base_precision int8, fp8 or nf4",
    "quantize_te": "use --text_encoder_precision int8, fp8 or nf4",
    "qtype": "use --base_precision int8, fp8 or nf4",
    "qtype_te": "use --text_encoder_precision int8, fp8 or nf4",
    "low_vram": "use --vram and the gigabytes of the GPU, or --vram auto",
    "layer_offloading": "use --offload_blocks and the number of blocks",
    # SimpleTuner
    "base_model_precision": "use --base_precision int8, fp8 or nf4",
    **dict.fromkeys(
        (f"text_encoder_{number}_precision" for number in (1, 2, 3, 4)), "use --text_encoder_precision for all of them"
    ),
    "base_model_default_dtype": "use --mixed_precision",
    "quantize_via": "leave it out: weights are packed on the device, one layer after the other",
    "enable_group_offload": "use --offload_blocks and the number of blocks",
    "attention_mechanism": "use --attention_backend",
}
"""Flags that are refused, with the reason or the flag to use."""

UNNEEDED: dict[str, str] = {
    "foreach_ema": "the moving average of --ema_decay is always made that way",
    "cache_latents": "latents are always cached here",
    "upcast_before_saving": "LoRA weights are float32 here, in training and when saved",
    "offload": "the autoencoder, and text encoders that do not train, are always freed before training",
    "cache_text_encoder_outputs": "embeddings of prompts are always cached here, unless the text encoder trains",
    **dict.fromkeys(("cache_latents_to_disk", "cache_text_encoder_outputs_to_disk"), "caches are always on disk here"),
    **dict.fromkeys(
        ("enable_vae_tiling", "vae_enable_tiling", "enable_vae_slicing", "vae_enable_slicing"),
        "the autoencoder works in tiles and on one image after the other where the memory asks for it",
    ),
}
"""Switches that are accepted with a note, since what they ask for is always so."""
