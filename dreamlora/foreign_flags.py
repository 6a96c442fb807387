"""Flags of diffusers' training scripts (and a few of other trainers) that have no option here, and what to do instead.

Together with the options of ``config.py`` this covers every flag of ``train_dreambooth_lora.py``.
"""

from __future__ import annotations

ELSEWHERE: dict[str, str] = {
    # train_dreambooth_lora.py
    "use_8bit_adam": "choose the optimizer with --optimizer instead; there are: {optimizers}",
    "tokenizer_name": "the tokenizer is always the pipeline's own (folder tokenizer/)",
    "text_encoder_use_attention_mask": "only DeepFloyd IF needs it, which is not supported",
    "validation_images": "only DeepFloyd IF's upscaler needs them, which is not supported",
    "class_labels_conditioning": "only DeepFloyd IF's upscaler needs it, which is not supported",
    # its SDXL and Flux relatives
    "do_edm_style_training": "EDM training is not supported; models train with the objective of their own scheduler",
    "output_kohya_format": "kohya's file format is not written; ComfyUI and others also read the diffusers format",
    "prodigy_beta3": "Prodigy is not among the optimizers: {optimizers}",
    "prodigy_decouple": "Prodigy is not among the optimizers: {optimizers}",
    "prodigy_use_bias_correction": "Prodigy is not among the optimizers: {optimizers}",
    "prodigy_safeguard_warmup": "Prodigy is not among the optimizers: {optimizers}",
    "use_dora": "DoRA is not supported: its magnitudes are no part of the pair B·A that the optimizers here work on",
    "enable_npu_flash_attention": "NPU attention is not supported",
    "bnb_quantization_config_path": "quantised base models are not supported; --mixed_precision bf16 halves the memory",
    "do_fp8_training": "fp8 is not supported; --mixed_precision bf16 halves the memory",
    "text_encoder_out_layers": "the layers are fixed by the model family",
    "skip_final_inference": "use --sample_steps 0 for no samples at all",
    "final_validation_prompt": "use --validation_prompt; it is drawn at the end as well",
    "aspect_ratio_buckets": "there are no buckets; images that are not square are cropped (see --crop_variants)",
    "use_aspect_ratio_buckets": "there are no buckets; images that are not square are cropped (see --crop_variants)",
    "remote_text_encoder": "the text encoder always runs here; it is freed before the denoiser is loaded",
    "fsdp_text_encoder": "sharding (FSDP) is not supported yet; several GPUs work with DDP",
    "caption_dropout": "captions are not dropped",
    # train_text_to_image_lora.py
    "train_data_dir": "use --instance_data_dir; captions lie beside the images (name.txt or metadata.jsonl)",
    # other trainers, and what people type first
    "lr": "use --learning_rate",
    "unet_lr": "use --learning_rate",
    "steps": "use --max_train_steps",
    "epochs": "use --num_train_epochs",
    "batch_size": "use --train_batch_size",
    "model": "use --pretrained_model_name_or_path",
    "network_dim": "use --rank",
    "network_alpha": "use --lora_alpha",
    "use_ema": "there is no average of the LoRA weights over steps",
}
"""Flags that are refused, with the reason or the flag to use."""

UNNEEDED: dict[str, str] = {
    "cache_latents": "latents are always cached here",
    "upcast_before_saving": "LoRA weights are float32 here, in training and when saved",
    "offload": "text encoder and autoencoder are always freed before training",
}
"""Switches that are accepted with a note, since what they ask for is always so."""
