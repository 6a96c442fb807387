"""What is written around the training: the config at its start; LoRA, parity check, summary and report at its end."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
import yaml
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from dreamlora import provenance
from dreamlora.config import RunConfig, as_flat_dict
from dreamlora.errors import UserError
from dreamlora.report import write_report
from dreamlora.runfolder import RunFolder, read_jsonl, write_atomically
from dreamlora.stages import DTYPES, Parts, Stage, give_back_memory
from dreamlora.training import parity, state
from dreamlora.training.loop import Run

FREE_ON_RESUME = {
    *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "local_rank", "cache_dir", "latents_cache_dir"),
    *("checkpointing_steps", "checkpoints_total_limit", "report_to", "logging_dir", "dataloader_num_workers"),
    *("push_to_hub", "hub_token", "hub_model_id", "sample_batch_size", "num_validation_images", "validation_epochs"),
    *("sample_prompts", "train_batch_size", "gradient_accumulation_steps", "instance_data_dir", "validation_prompt"),
    *("pretrained_model_name_or_path", "pre_compute_text_embeddings", "num_train_epochs", "allow_pickle", "subject"),
    *("sample_steps", "sample_seed", "num_images_per_prompt", "negative_prompt", "eval_steps", "eval_batch_size"),
    *("optimizer_args", "prior_generation_precision", "final_eval_items", "save_best", "early_stopping"),
    *("eval_metrics", "eval_metrics_steps", "eval_prompts", "eval_num_images"),
    *("clip_model", "dino_model", "inception_weights"),
    *("train_data_dir", "style", "streaming"),
}
"""Options that a resumed run may change: they do not touch the training, or are checked by what they stand for (the
model's id, the images' hashes, the global batch size)."""


FINAL_METRICS = ("eval/final_loss", "eval/final_loss_rel", "eval/gap")
UPLOADED = ["README.md", "pytorch_lora_weights.safetensors", "samples/*", "best/*"]


def write_config(config: RunConfig, folder: RunFolder, device: torch.device) -> None:
    """config.yaml: what ``--config`` takes to run the same again, with what made it as a comment.

    Without secrets, and without what is about this run's folder: the other run gets one of its own.
    """
    left_out = ("hub_token", "local_rank", "output_dir", "overwrite_output_dir", "resume_from_checkpoint")
    options = {name: value for name, value in as_flat_dict(config).items() if name not in left_out}
    versions = ", ".join(f"{name} {number}" for name, number in provenance.versions().items())
    made_by = f"commit {provenance.git_commit()}, {provenance.device_name(device)}"
    head = "".join(f"# {line}\n" for line in (provenance.command(), versions, made_by))
    write_atomically(folder.config_file, head + yaml.safe_dump(options, sort_keys=False, allow_unicode=True))


def settings(stage: Stage, images: Iterable[str], options: Any) -> dict[str, Any]:
    """What a resumed run must share with the run that wrote the checkpoint.

    Args:
        stage: with the settled config.
        images: content hashes and captions of all training images, in order.
        options: of the optimizer.
    """
    kept = {name: value for name, value in as_flat_dict(stage.config).items() if name not in FREE_ON_RESUME}
    train = stage.config.train
    world = stage.accelerator.num_processes
    kept["global batch size"] = (train.train_batch_size or 1) * train.gradient_accumulation_steps * world
    kept["optimizer settings"] = str(options)
    kept["base model"] = stage.source.model_id
    digest = hashlib.sha256()
    for image in images:
        digest.update(image.encode())
    kept["training images"] = digest.hexdigest()[:16]
    if stage.config.optim.lr_scheduler.startswith("constant"):
        del kept["max_train_steps"]  # a longer run of the same course
    return kept


def finish(stage: Stage, run: Run) -> None:
    """Write the LoRA, compare it with what training showed, sum up, write the report, upload if asked to."""
    if run.accelerator.is_main_process:
        state.save_lora(run, run.folder.path)
        with stage.timed("parity check"):
            found = _parity(stage, run)
        write_summary(stage, run, found)
        give_back_memory()  # the charts' library would come on top of what training has used
        write_report(run.folder.path)
        if stage.config.train.push_to_hub:
            _push_to_hub(run)
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()


def write_summary(stage: Stage, run: Run, found: dict[str, Any]) -> None:
    """summary.json: what the report shows besides options and metrics."""
    metric = _eval_rows(run.folder)
    trained = sum(parameter.numel() for parameter in run.trainables.values())
    summary = {
        "parity": found,
        "timings": stage.timings,
        "versions": provenance.versions(),
        "device": provenance.device_name(run.accelerator.device),
        "peak_memory_gib": _peak_memory(run.accelerator.device),
        "processes": run.accelerator.num_processes,
        "git_commit": provenance.git_commit(),
        "warnings": stage.warnings,
        "data": {source.name: len(source.store.names) for source in run.stream.sources},
        "lora": {"parameters": trained, "pairs": len(run.trainables) // 2},
        "eval": metric,
        "best": run.folder.selection(),
        "final_eval": _final_rows(run.folder),
        "ended_early": run.ended_early,
        "command": provenance.command(),
    }
    write_atomically(run.folder.summary_file, json.dumps(summary, indent=1))


def _peak_memory(device: torch.device) -> float | None:
    """GiB that this process has had allocated on its GPU at most; None on other devices, which do not count."""
    return round(torch.cuda.max_memory_allocated(device) / 2**30, 3) if device.type == "cuda" else None


def _eval_rows(folder: RunFolder) -> dict[str, Any]:
    rows = [row for row in folder.metrics() if row["name"] in ("eval/loss", "eval/loss_train")]
    if not rows:
        return {}
    best = min(rows, key=lambda row: row["value"])
    return {"base": rows[0]["value"], "final": rows[-1]["value"], "best": best["value"], "best_step": best["step"]}


def _final_rows(folder: RunFolder) -> dict[str, dict[str, float]]:
    """What was measured on the larger set, by step: value by metric."""
    found: dict[str, dict[str, float]] = {}
    for row in folder.metrics():
        if row["name"] in FINAL_METRICS:
            found.setdefault(str(row["step"]), {})[row["name"]] = row["value"]
    return found


def _parity(stage: Stage, run: Run) -> dict[str, Any]:
    """Compare the last sample of the first prompt with what a fresh stock pipeline draws from the saved file."""
    rows = [row for row in read_jsonl(run.folder.samples_file) if row["step"] == run.step]
    if not rows:
        return {"reason": "no samples were drawn at the last step"}
    run.components.clear()  # the models of the training make room for the fresh pipeline
    run.model.cpu()
    stage.parts.free("denoiser", "vae", "text", "scheduler")
    fresh = Parts(stage.family, stage.source, run.accelerator.device, DTYPES[run.accelerator.mixed_precision])
    sample = {**rows[0], "negative_prompt": run.config.sample.negative_prompt}
    try:
        return parity.check(fresh.pipeline(), run.folder.path, sample, run.folder.samples / sample["file"])
    except (UserError, OSError, RuntimeError, ValueError) as error:  # out of memory, ...: the report is still written
        return {"reason": f"the check could not be made: {error}"}


def check_hub(config: RunConfig) -> None:
    """Whether an upload will be possible, asked before training.

    Raises:
        UserError: the hub cannot be reached, or does not know the token.
    """
    try:
        HfApi(token=config.train.hub_token).whoami()
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        raise UserError(f"--push_to_hub: {error}. Log in with `hf auth login`, or give --hub_token") from error


def _push_to_hub(run: Run) -> None:
    """Upload LoRA, samples and a model card. Checkpoints, config and report stay here: they show photos and paths."""
    train = run.config.train
    api = HfApi(token=train.hub_token)
    name = train.hub_model_id or run.folder.path.name
    card = load_or_create_model_card(
        repo_id_or_path=name,
        from_training=True,
        base_model=run.config.model.pretrained_model_name_or_path,
        prompt=run.config.data.instance_prompt,
        model_description=f"A LoRA of rank {run.config.lora.rank}, trained by dreamlora.",
    )
    populate_model_card(card, tags=["lora", "text-to-image", "diffusers"]).save(run.folder.path / "README.md")
    repository = api.create_repo(name, exist_ok=True).repo_id
    api.upload_folder(repo_id=repository, folder_path=str(run.folder.path), allow_patterns=UPLOADED)
