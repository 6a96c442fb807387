"""What a resumed run must share with the run that wrote its checkpoint, and what it may change."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from dreamlora.config import RunConfig, as_flat_dict
from dreamlora.config.publishing import Label
from dreamlora.errors import UserError
from dreamlora.run.context import RunContext
from dreamlora.run.image_list import changes, fingerprint
from dreamlora.run.images import RunImages
from dreamlora.runfolder import RunFolder
from dreamlora.training.loop import Run
from dreamlora.training.state import Checkpoint

FREE_ON_RESUME = {
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "local_rank", "cache_dir", "latents_cache_dir"),
    *("checkpointing_steps", "checkpoints_total_limit", "report_to", "logging_dir", "dataloader_num_workers"),
    *("tracker_project_name", "tracker_run_name"),
    *("push_to_hub", "hub_token", "hub_model_id", "sample_batch_size", "num_validation_images", "validation_epochs"),
    *("sample_prompts", "train_batch_size", "gradient_accumulation_steps", "instance_data_dir", "validation_prompt"),
    *("pretrained_model_name_or_path", "revision", "pre_compute_text_embeddings", "num_train_epochs", "allow_pickle"),
    *("sample_steps", "sample_seed", "num_images_per_prompt", "negative_prompt", "eval_steps", "eval_batch_size"),
    *("optimizer_args", "prior_generation_precision", "final_eval_items", "save_best", "early_stopping"),
    *("eval_metrics", "eval_metrics_steps", "eval_prompts", "eval_num_images"),
    *("clip_model", "dino_model", "inception_weights"),
    *("train_data_dir", "subject", "style", "streaming", "parity_check", "parity", "mask_data_dir"),
    *("conditioning_data_dir",),
    *("captions_per_line", "dry_run", "validation_images", "training_adapter", "training_adapter_weight_name"),
    *("gradient_checkpointing", "offload_blocks"),  # the same numbers with and without
    *("vram",),  # what it decides is compared by itself
    *("vae_tiling",),  # see ``take_over_latents``
    *("init_lora", "init_lora_weight_name", "save_format", *(option.name for option in fields(Label))),
}
"""Options that a resumed run may change: they do not touch the training, or are checked by what they stand for (the
model's id, the images' hashes, the global batch size)."""


UNCHECKED = "the run was stopped before that"
"""Why there are no figures of a parity check that was still to come."""
_IMAGES, _CLASSES, _TILES = "training images", "class images", "vae_tiling"


def settings(context: RunContext, pictures: RunImages, options: Any) -> dict[str, Any]:
    """What a resumed run must share with the run that wrote the checkpoint.

    Args:
        context: with the settled config.
        pictures: of the run; class images need not be known yet.
        options: of the optimizer.
    """
    kept = {name: value for name, value in as_flat_dict(context.config).items() if name not in FREE_ON_RESUME}
    for number, entry in enumerate(kept.pop("datasets"), start=1):
        kept |= {f"{name} of data set {number}": entry[name] for name in entry.keys() - FREE_ON_RESUME}
    train = context.config.train
    world = context.accelerator.num_processes
    kept["global batch size"] = (train.train_batch_size or 1) * train.gradient_accumulation_steps * world
    kept["optimizer settings"] = str(options)
    kept["base model"] = context.source.model_id
    if context.training_adapter:
        kept["training adapter"] = context.adapter_content
    if context.predecessor:
        kept["LoRA that it began with"] = context.predecessor.content
    kept[_IMAGES] = fingerprint(pictures.train)
    if pictures.classes:
        kept[_CLASSES] = fingerprint(pictures.classes)
    if context.config.optim.lr_scheduler.startswith("constant"):
        del kept["max_train_steps"]  # a longer run of the same course
    return kept


def latents(context: RunContext) -> dict[str, Any]:
    """How the latents of a run were made, for the checkpoint: that was decided by what memory sufficed for."""
    return {_TILES: context.config.model.vae_tiling}


def take_over_latents(context: RunContext, checkpoint: Checkpoint) -> None:
    """Have them made in the same way again, whatever memory suffices for now."""
    tiles = bool(checkpoint.settings.get(_TILES))
    context.config = replace(context.config, model=replace(context.config.model, vae_tiling=tiles))
    context.limits.tiles = tiles or context.limits.tiles


def require_same(checkpoint: Checkpoint, now: Mapping[str, Any], pictures: RunImages) -> None:
    """Nothing, if the run can go on from the checkpoint.

    Args:
        checkpoint: that was asked for.
        now: settings of this run.
        pictures: of this run. Without class images, these are not compared: they may have to be made first.

    Raises:
        UserError: settings or images are others; the message says which.
    """
    usual = {name: value for name, value in as_flat_dict(RunConfig()).items() if name in now}
    then = {name: value for name, value in checkpoint.settings.items() if name not in FREE_ON_RESUME}
    saved = usual | then  # an older version knew fewer options, and compared more
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


def made(run: Run, pictures: RunImages) -> dict[str, Any]:
    """What a run has made, for ``complete``."""
    return {"steps": run.step, "settings": run.settings, "wanted": _wanted(run.config, pictures)}


def _wanted(config: RunConfig, pictures: RunImages) -> dict[str, Any]:
    """How long a run is to be, and what it is to show, to measure and to say of itself; not how that is computed."""
    groups = (config.sample, config.eval, config.encoders, config.about)
    names = {option.name for group in groups for option in fields(group)} - {"eval_batch_size"}
    shown = {name: value for name, value in as_flat_dict(config).items() if name in names}
    prompts = [*pictures.prompts, *pictures.eval_prompts]
    return {"max_train_steps": config.train.max_train_steps, "prompts": prompts, **shown}


def complete(config: RunConfig, folder: RunFolder, settings: dict[str, Any], pictures: RunImages) -> str:
    """That ``--resume_from_checkpoint latest`` has nothing to do, in words; empty if it has.

    Args:
        config: all of whose options are decided.
        folder: of the run.
        settings: that a resumed run must share; class images are not compared, as they are not read for this.
        pictures: with the prompts; other ones are still to be drawn.

    Raises:
        UserError: the folder holds a LoRA of other settings, prompts or length, and no checkpoint to go on from.
    """
    if config.train.resume_from_checkpoint != "latest":
        return ""
    summary = folder.summary()
    before = summary.get("made") or {"settings": {}, "wanted": {}, "steps": 0}
    wanted = _wanted(config, pictures)
    if before["steps"] >= (config.train.max_train_steps or 0):
        wanted["max_train_steps"] = before["wanted"].get("max_train_steps")  # a longer run is complete too
    kept = {name: value for name, value in before["settings"].items() if name != _TILES}
    same = before["wanted"] == wanted and {**kept, _CLASSES: None} == {**settings, _CLASSES: None}
    unchecked = summary.get("parity") == {"reason": UNCHECKED} and before["steps"] in folder.checkpoint_steps()
    if same and folder.lora_file.exists() and not unchecked:
        further = "give a larger --max_train_steps"
        if "max_train_steps" in settings:
            further = (
                f"begin another with --init_lora {folder.path} and another --output_dir (--lr_scheduler "
                f"{config.optim.lr_scheduler} has ended; with constant ones a larger --max_train_steps does)"
            )
        return (
            f"the run in {folder.path} is complete ({before['steps']} steps). To train it further {further}, to begin "
            "anew --overwrite_output_dir without --resume_from_checkpoint"
        )
    if folder.holds_result() and not folder.checkpoint_steps():
        raise UserError(
            f"--resume_from_checkpoint latest: {folder.path} holds a LoRA of other settings, prompts or length, and no "
            "checkpoint to go on from. Give another --output_dir, or --overwrite_output_dir alone to begin anew"
        )
    return ""


def way_on(folder: RunFolder, command: str) -> str:
    """What a person whose run was stopped does next.

    Args:
        command: that was stopped.
    """
    steps = folder.checkpoint_steps()
    if steps:
        where = f"The checkpoint of step {steps[-1]} lies in {folder.checkpoint_dir(steps[-1])}"
    elif folder.holds_result():
        where = f"The LoRA is trained and lies in {folder.lora_file}; the rest is not there yet"
    else:
        where = "Nothing was trained yet; what was encoded and drawn so far is kept"
    words = shlex.split(command)
    if not any(word.split("=")[0].replace("-", "_") == "__output_dir" for word in words):
        words += ["--output_dir", str(folder.path)]
    if not any(word.split("=")[0].replace("-", "_") == "__resume_from_checkpoint" for word in words):
        words += ["--resume_from_checkpoint", "latest"]
    words = [word for word in words if word.replace("-", "_") != "__overwrite_output_dir"]
    return f"{where}. This goes on:\n    {shlex.join(words)}"
