"""What a resumed run must share with the run that wrote its checkpoint, and what it may change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dreamlora.config import RunConfig, as_flat_dict
from dreamlora.errors import UserError
from dreamlora.run.context import RunContext
from dreamlora.run.image_list import changes, fingerprint
from dreamlora.run.images import RunImages
from dreamlora.runfolder import RunFolder
from dreamlora.training.state import Checkpoint

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
    *("train_data_dir", "subject", "style", "streaming", "parity_check", "mask_data_dir"),
    *("captions_per_line", "dry_run"),
}
"""Options that a resumed run may change: they do not touch the training, or are checked by what they stand for (the
model's id, the images' hashes, the global batch size)."""


_IMAGES, _CLASSES = "training images", "class images"


def settings(context: RunContext, pictures: RunImages, options: Any) -> dict[str, Any]:
    """What a resumed run must share with the run that wrote the checkpoint.

    Args:
        context: with the settled config.
        pictures: of the run; class images need not be known yet.
        options: of the optimizer.
    """
    kept = {name: value for name, value in as_flat_dict(context.config).items() if name not in FREE_ON_RESUME}
    kept["datasets"] = [{name: entry[name] for name in entry.keys() - FREE_ON_RESUME} for entry in kept["datasets"]]
    train = context.config.train
    world = context.accelerator.num_processes
    kept["global batch size"] = (train.train_batch_size or 1) * train.gradient_accumulation_steps * world
    kept["optimizer settings"] = str(options)
    kept["base model"] = context.source.model_id
    kept[_IMAGES] = fingerprint(pictures.train)
    if pictures.classes:
        kept[_CLASSES] = fingerprint(pictures.classes)
    if context.config.optim.lr_scheduler.startswith("constant"):
        del kept["max_train_steps"]  # a longer run of the same course
    return kept


def require_same(checkpoint: Checkpoint, now: Mapping[str, Any], pictures: RunImages) -> None:
    """Nothing, if the run can go on from the checkpoint.

    Args:
        checkpoint: that was asked for.
        now: settings of this run.
        pictures: of this run. Without class images, these are not compared: they may have to be made first.

    Raises:
        UserError: settings or images are others; the message says which.
    """
    saved = {**as_flat_dict(RunConfig()), **checkpoint.settings}  # an older version knew fewer options
    saved = {name: value for name, value in saved.items() if name not in FREE_ON_RESUME}
    apart = {_IMAGES, _CLASSES}
    different = [
        f"{name}: {saved.get(name, 'none')!r} then, {now.get(name, 'none')!r} now"
        for name in sorted((saved.keys() | now.keys()) - apart)
        if saved.get(name) != now.get(name)
    ]
    begin = "begin a new run with another --output_dir"
    if different:
        raise UserError(
            f"{checkpoint.path} was made with other settings: {'; '.join(different)}. Give the same flags, or {begin}"
        )
    if saved.get(_IMAGES) != now[_IMAGES]:
        changed = changes(RunFolder(checkpoint.path.parent.parent).images_file, pictures)
        raise UserError(
            f"images or captions are others than when {checkpoint.path} was written "
            f"({changed or 'the same ones in another order'}). Put them back as they were to go on, or {begin}, which "
            "learns the new ones from its first step"
        )
    if pictures.classes and saved.get(_CLASSES, now[_CLASSES]) != now[_CLASSES]:  # older checkpoints have none
        raise UserError(
            f"class images or their captions are others than when {checkpoint.path} was written. Put them back as they "
            f"were to go on, or {begin}"
        )
