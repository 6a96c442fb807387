"""Base models in folders, as far as that is known without torch and without the hub."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

from dreamlora import tiny
from dreamlora.config import Model
from dreamlora.errors import UserError
from dreamlora.models.single_file.contents import read_contents
from dreamlora.models.single_file.kinds import recognize
from dreamlora.models.single_file.others import check_autoencoder

INDEX = "model_index.json"
SINGLE_FILES = (".safetensors", ".ckpt", ".gguf")
"""No repository of a pipeline is called so."""


def check_model(model: Model) -> None:
    """Nothing, if the model and the autoencoder in place of its own are folders or single files of such, or may be hub
    repositories.

    Raises:
        UserError: see ``local_file``, ``recognize`` and ``check_autoencoder``.
    """
    path, vae = model.pretrained_model_name_or_path, model.pretrained_vae_model_name_or_path
    if is_single_file(path):
        recognize(read_contents(Path(path)))
    elif path not in tiny.MODELS:
        local_file(path, INDEX)
    if vae and is_single_file(vae):
        check_autoencoder(read_contents(Path(vae)))
    elif vae:
        local_file(vae, vae_file(vae))


def is_single_file(path: str) -> bool:
    """Whether it is a file of this machine; the hub has no names for single ones."""
    return path not in tiny.MODELS and Path(path).is_file()


def local_file(path: str, name: str) -> Path | None:
    """A file of a folder; None if ``path`` can be a hub repository.

    Raises:
        UserError: there is no such folder or file, or the path is a file, or can only be one, or it is the name of
            an embedded model or nearly so.
    """
    local = Path(path)
    if local.is_file():
        raise UserError(f"{path} is a single file, but a folder written by save_pretrained is needed here")
    if local.is_dir():
        if not (local / name).is_file():
            raise UserError(f"{path}: no {name}; the folder of a whole model, written by save_pretrained, is needed")
        return local / name
    if path.lower().endswith(SINGLE_FILES):
        raise UserError(f"no such file: {path}")
    if path.count("/") > 1 or path.startswith((".", "/", "~")):
        raise UserError(f"no such folder: {path}")
    if path in tiny.MODELS:
        raise UserError(f"{path} is an embedded model, and a folder or the name of a hub repository is needed here")
    if meant := _nearly_embedded(path):
        raise UserError(f"there is no folder {path}, and no embedded model of that name. Did you mean {meant}?")
    return None


def _nearly_embedded(path: str) -> str | None:
    """The embedded model that somebody may have meant; names of the hub have owners."""
    if "/" in path:
        return None
    letters = {_letters(name): name for name in tiny.MODELS}
    near = difflib.get_close_matches(_letters(path), letters, n=1, cutoff=0.75)
    return letters[near[0]] if near else None


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


def vae_file(path: str) -> str:
    """An autoencoder given by itself has its config at the top; a whole pipeline may be named as well."""
    return "vae/config.json" if Path(path, "vae", "config.json").is_file() else "config.json"
