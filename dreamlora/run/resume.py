"""What a resumed run must share with the run that wrote its checkpoint, and what it may change."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

from dreamlora.config import as_flat_dict
from dreamlora.run.context import RunContext

FREE_ON_RESUME = {
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "local_rank", "cache_dir", "latents_cache_dir"),
    *("checkpointing_steps", "checkpoints_total_limit", "report_to", "logging_dir", "dataloader_num_workers"),
    *("push_to_hub", "hub_token", "hub_model_id", "sample_batch_size", "num_validation_images", "validation_epochs"),
    *("sample_prompts", "train_batch_size", "gradient_accumulation_steps", "instance_data_dir", "validation_prompt"),
    *("pretrained_model_name_or_path", "revision", "pre_compute_text_embeddings", "num_train_epochs", "allow_pickle"),
    *("sample_steps", "sample_seed", "num_images_per_prompt", "negative_prompt", "eval_steps", "eval_batch_size"),
    *("optimizer_args", "prior_generation_precision", "final_eval_items", "save_best", "early_stopping"),
    *("eval_metrics", "eval_metrics_steps", "eval_prompts", "eval_num_images"),
    *("clip_model", "dino_model", "inception_weights"),
    *("train_data_dir", "subject", "style", "streaming", "parity_check", "captions_per_line", "dry_run"),
}
"""Options that a resumed run may change: they do not touch the training, or are checked by what they stand for (the
model's id, the images' hashes, the global batch size)."""


def settings(context: RunContext, images: Iterable[str], options: Any) -> dict[str, Any]:
    """What a resumed run must share with the run that wrote the checkpoint.

    Args:
        context: with the settled config.
        images: content hashes and captions of all training images, in order.
        options: of the optimizer.
    """
    kept = {name: value for name, value in as_flat_dict(context.config).items() if name not in FREE_ON_RESUME}
    train = context.config.train
    world = context.accelerator.num_processes
    kept["global batch size"] = (train.train_batch_size or 1) * train.gradient_accumulation_steps * world
    kept["optimizer settings"] = str(options)
    kept["base model"] = context.source.model_id
    digest = hashlib.sha256()
    for image in images:
        digest.update(image.encode())
    kept["training images"] = digest.hexdigest()[:16]
    if context.config.optim.lr_scheduler.startswith("constant"):
        del kept["max_train_steps"]  # a longer run of the same course
    return kept
