"""Uploads to the hub: whether one will be possible, and the upload itself."""

from __future__ import annotations

from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from dreamlora.config import RunConfig
from dreamlora.errors import UserError
from dreamlora.files import write_atomically
from dreamlora.runfolder import RunFolder

UPLOADED = ["README.md", "pytorch_lora_weights.safetensors", "samples/*", "best/*"]


def check_hub(config: RunConfig) -> None:
    """Whether an upload will be possible, asked before training.

    Raises:
        UserError: the hub cannot be reached, or does not know the token.
    """
    try:
        HfApi(token=config.train.hub_token).whoami()
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        raise UserError(f"--push_to_hub: {error}. Log in with `hf auth login`, or give --hub_token") from error


def push_to_hub(config: RunConfig, folder: RunFolder) -> None:
    """Upload LoRA, samples and a model card. Checkpoints, config and report stay here: they show photos and paths."""
    train = config.train
    api = HfApi(token=train.hub_token)
    name = train.hub_model_id or folder.path.name
    card = load_or_create_model_card(
        repo_id_or_path=name,
        from_training=True,
        base_model=config.model.pretrained_model_name_or_path,
        prompt=config.data.subject_prompt,
        model_description=f"A LoRA of rank {config.lora.rank}, trained by dreamlora.",
    )
    card = populate_model_card(card, tags=["lora", "text-to-image", "diffusers"])
    write_atomically(folder.path / "README.md", str(card))
    repository = api.create_repo(name, exist_ok=True).repo_id
    api.upload_folder(repo_id=repository, folder_path=str(folder.path), allow_patterns=UPLOADED)
