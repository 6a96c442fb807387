"""Base models in folders, as far as that is known without torch and without the hub."""

from __future__ import annotations

from pathlib import Path

from dreamlora.config import EMBEDDED_MODEL, Model
from dreamlora.errors import UserError

INDEX = "model_index.json"


def check_model(model: Model) -> None:
    """Nothing, if the model's folder and that of its autoencoder have what makes them one, or may be hub repositories.

    Raises:
        UserError: see ``local_file``.
    """
    if model.pretrained_model_name_or_path != EMBEDDED_MODEL:
        local_file(model.pretrained_model_name_or_path, INDEX)
    vae = model.pretrained_vae_model_name_or_path
    if vae:
        local_file(vae, vae_file(vae))


def local_file(path: str, name: str) -> Path | None:
    """A file of a folder; None if ``path`` can be a hub repository.

    Raises:
        UserError: there is no such folder or file, or the path is a file.
    """
    local = Path(path)
    if local.is_file():
        raise UserError(
            f"{path} is a single file, but a folder written by save_pretrained is needed: load a pipeline's file with "
            "the pipeline class's from_single_file and save it with save_pretrained"
        )
    if local.is_dir():
        if not (local / name).is_file():
            raise UserError(f"{path}: no {name}; the folder of a whole model, written by save_pretrained, is needed")
        return local / name
    if path.count("/") > 1 or path.startswith((".", "/", "~")):
        raise UserError(f"no such folder: {path}")
    return None


def vae_file(path: str) -> str:
    """An autoencoder given by itself has its config at the top; a whole pipeline may be named as well."""
    return "vae/config.json" if Path(path, "vae", "config.json").is_file() else "config.json"
