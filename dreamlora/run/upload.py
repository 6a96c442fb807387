"""Uploads to the hub: whether one will be possible, and the upload itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from huggingface_hub import CommitOperationAdd, HfApi

from dreamlora import registry, tiny
from dreamlora.config import RunConfig
from dreamlora.errors import UserError
from dreamlora.files import write_atomically
from dreamlora.lora.embeddings import file_of
from dreamlora.models.local import local_file
from dreamlora.reading import is_regular
from dreamlora.runfolder import RunFolder
from dreamlora.sampling.recorded import recorded_picture, rows_with_places

CARD = "README.md"
TOLD = (
    *("step", "prompt_index", "image_index", "prompt", "negative_prompt", "seed", "file", "sha256"),
    *("num_inference_steps", "guidance_scale", "lora_scale", "scheduler", "problem"),
)
"""What is told of a sample."""


def check_hub(config: RunConfig) -> None:
    """Whether an upload will be possible, asked before training.

    Raises:
        UserError: the hub cannot be reached, or does not know the token.
    """
    try:
        HfApi(token=config.train.hub_token).whoami()
    except Exception as error:  # also of what makes no header of a request, such as a token of two words
        raise UserError(
            f"--push_to_hub: {_without_token(error, config)}. Log in with `hf auth login`, or give --hub_token"
        ) from None


def push_to_hub(config: RunConfig, folder: RunFolder) -> None:
    """Upload LoRA, samples and a model card: what this run has made, none of it from behind a link.

    Checkpoints, config and report stay here: they show photos and paths.

    Raises:
        UserError: the hub refused.
    """
    train = config.train
    api = HfApi(token=train.hub_token)
    try:
        repository = api.create_repo(train.hub_model_id or folder.path.resolve().name, exist_ok=True).repo_id
        card = _card(config, repository)
        write_atomically(folder.path / CARD, card)
        api.create_commit(
            repository,
            [CommitOperationAdd(CARD, card.encode()), *_made(config, folder)],
            commit_message="LoRA, samples and model card of a run of dreamlora",
        )
    except UserError:
        raise
    except Exception as error:  # of the hub, the network, and what lies between
        raise UserError(
            f"--push_to_hub: the run in {folder.path} is complete, but the upload failed: "
            f"{_without_token(error, config)}. The same command with --resume_from_checkpoint latest tries it again"
        ) from error


def _made(config: RunConfig, folder: RunFolder) -> Iterator[CommitOperationAdd]:
    """The files to upload, besides the card."""
    loras = (folder.lora_file, folder.best / folder.lora_file.name)
    embeddings = (file_of(place.parent, new.token) for place in loras for new in config.tokens.tokens)
    for file in (*loras, *embeddings, folder.selection_file):
        if is_regular(file, folder.path):
            yield CommitOperationAdd(file.relative_to(folder.path).as_posix(), str(file))
    exported = (folder.exported(form, at) for form in config.train.save_format for at in (folder.path, folder.best))
    for entry in exported:
        for file in sorted(entry.rglob("*")) if entry.is_dir() else [entry]:
            if is_regular(file, folder.path):
                yield CommitOperationAdd(file.relative_to(folder.path).as_posix(), str(file))
    place = folder.samples.relative_to(folder.path)
    rows = []
    for row in rows_with_places(folder.samples_file, folder.path):
        if recorded_picture(folder.samples, row, folder.path) is not None:
            rows.append({name: row[name] for name in TOLD if name in row})
            yield CommitOperationAdd((place / row["file"]).as_posix(), str(folder.samples / row["file"]))
    if rows:
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        yield CommitOperationAdd((place / folder.samples_file.name).as_posix(), lines.encode())


def _card(config: RunConfig, repository: str) -> str:
    """The model card; the base model is named if it is one of the hub: of a folder nobody else knows anything."""
    kind = registry.load("adapters", config.lora.adapter).NAME
    card = load_or_create_model_card(
        repo_id_or_path=repository,
        token=config.train.hub_token,
        from_training=True,
        base_model=_hub_name(config.model.pretrained_model_name_or_path),
        prompt=config.data.subject_prompt,
        model_description=f"A {kind} of rank {config.lora.rank}, trained by dreamlora.{_tokens_told(config)}",
    )
    if getattr(card.data, "base_model", None):  # one that is there already may be from before this was so
        card.data.base_model = _hub_name(str(card.data.base_model))
    return str(populate_model_card(card, tags=["lora", "text-to-image", "diffusers"]))


def _tokens_told(config: RunConfig) -> str:
    """What a card says of new tokens."""
    files = " and ".join(f"`{file_of(Path(), new.token)}` for `{new.token}`" for new in config.tokens.tokens)
    return f" It needs the embeddings of its new tokens too: {files} in prompts." if files else ""


def _hub_name(model: str) -> str | None:
    """The name of a model of the hub; None for a folder."""
    if model in tiny.MODELS or Path(model).exists():
        return None
    try:
        local_file(model, "")
    except UserError:  # a folder that is there no more
        return None
    return model


def _without_token(error: Exception, config: RunConfig) -> str:
    """What an error says, on one line; some tell the request."""
    text = " ".join(str(error).split()) or type(error).__name__
    token = config.train.hub_token
    return text.replace(token, "***") if token else text
