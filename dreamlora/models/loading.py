"""Where a pipeline's parts come from: a folder, the hub or the embedded model. Safetensors only by default."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

from dreamlora import registry
from dreamlora.config import EMBEDDED_MODEL, Model
from dreamlora.errors import DISK_FULL, UserError
from dreamlora.interfaces import Components, Family, ModelSource
from dreamlora.models.fingerprint import fingerprint
from dreamlora.models.local import INDEX, local_file, vae_file

SCHEDULER = "scheduler"


def resolve_source(model: Model, prediction_type: str | None = None, vae_revision: str | None = None) -> ModelSource:
    """Where the model comes from, and the id that caches know it by.

    The id of a folder holds a fingerprint of its files, that of a hub repository its commit, and both hold the id of an
    autoencoder that replaces theirs: latents made by another model are never taken for this one's. What a branch of the
    hub points to is looked up here alone, and every part is loaded from that commit, though the branch may move.

    Args:
        model: the options.
        prediction_type: of the run, instead of the scheduler's own; None: that.
        vae_revision: of the other autoencoder's repository.

    Raises:
        UserError: no such folder or repository, or it is no diffusers pipeline.
    """
    name, cache = model.pretrained_model_name_or_path, model.cache_dir
    path = _embedded() if name == EMBEDDED_MODEL else name
    revision = commit_of(path, INDEX, model.revision, cache)
    parts = [identity(name, path, revision), *([model.variant] if model.variant else [])]
    vae = model.pretrained_vae_model_name_or_path
    if vae:
        vae_revision = commit_of(vae, vae_file(vae), vae_revision, cache)
        parts.append("vae:" + identity(vae, vae, vae_revision))
    return ModelSource(
        path=path,
        model_id="+".join(parts),
        revision=revision,
        variant=model.variant,
        vae_path=vae,
        vae_revision=vae_revision if vae else None,
        cache_dir=cache,
        allow_pickle=model.allow_pickle,
        prediction_type=prediction_type,
    )


def read_model_index(source: ModelSource) -> dict[str, Any]:
    """The pipeline's ``model_index.json``: its class and its parts as ``{name: [library, class]}``.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    file = find_file(source.path, INDEX, source.revision, source.cache_dir)
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{source.path}: {INDEX} is not valid JSON ({error}); copy or download the model again"
        ) from error
    if not isinstance(index, dict) or "_class_name" not in index:
        raise UserError(
            f"{source.path}: {INDEX} does not name a pipeline (no _class_name); is it a diffusers pipeline?"
        )
    return index


def family_of(source: ModelSource, name: str | None = None) -> Family:
    """The family module for a pipeline: ``name`` if given, else the one that handles its class.

    Raises:
        UserError: no family handles it; the message lists what is supported.
    """
    if name is not None:
        return cast(Family, registry.load("families", name))
    pipeline = read_model_index(source)["_class_name"]
    families = {name: cast(Family, registry.load("families", name)) for name in registry.names("families")}
    for family in families.values():
        if pipeline in family.PIPELINES:
            return family
    known = "; ".join(f"{name}: {', '.join(family.PIPELINES)}" for name, family in families.items())
    raise UserError(
        f"{source.path} is a {pipeline}, which is not supported. Supported pipelines: {known}. "
        f"--family chooses one all the same."
    )


def read_config(source: ModelSource, component: str) -> dict[str, Any]:
    """``config.json`` of one part, without its weights; of the scheduler its ``scheduler_config.json``.

    Raises:
        UserError: there is none.
    """
    if component == "vae" and source.vae_path:
        file = find_file(source.vae_path, vae_file(source.vae_path), source.vae_revision, source.cache_dir)
    else:
        name = "scheduler_config.json" if component == SCHEDULER else "config.json"
        file = find_file(source.path, f"{component}/{name}", source.revision, source.cache_dir)
    return json.loads(file.read_text(encoding="utf-8"))


def load_components(source: ModelSource, names: Sequence[str], dtype: torch.dtype | None) -> Components:
    """Parts of the pipeline by name, each of the class that model_index.json says; modules are frozen and in eval mode.

    Raises:
        UserError: a part is missing, incomplete, of an unknown class, or only there as a pickle.
    """
    index = read_model_index(source)
    disable_progress_bar()  # one bar per part, for what takes a second; downloads keep theirs
    return {name: _load(source, name, index, dtype) for name in names}


def _load(source: ModelSource, name: str, index: dict[str, Any], dtype: torch.dtype | None) -> Any:
    arguments: dict[str, Any] = {"cache_dir": source.cache_dir}
    if name == "vae" and source.vae_path:
        path, part_class = (
            source.vae_path,
            _class("diffusers", read_config(source, "vae")["_class_name"], source.vae_path),
        )
        arguments |= {
            "subfolder": str(Path(vae_file(path)).parent).removeprefix("."),
            "revision": source.vae_revision,
        }
    else:
        path, part_class = source.path, _class(*_entry(source, name, index), source.path)
        arguments |= {"subfolder": name, "revision": source.revision}
    if not issubclass(part_class, torch.nn.Module):
        part = _from_pretrained(part_class, path, name, arguments)
        if name == SCHEDULER and source.prediction_type:
            part.register_to_config(prediction_type=source.prediction_type)
        return part
    if path == source.path:
        arguments["variant"] = source.variant
    if not source.allow_pickle:
        arguments["use_safetensors"] = True
        refuse_pickles(Path(path, arguments["subfolder"]), name)
    arguments["torch_dtype" if part_class.__module__.startswith("diffusers") else "dtype"] = dtype
    part, info = _from_pretrained(part_class, path, name, arguments | {"output_loading_info": True})
    if info["missing_keys"]:
        # both libraries go on with random numbers there
        missing = sorted(info["missing_keys"])
        raise UserError(
            f"{path}: the weights of {name!r} lack {len(missing)} tensors, {missing[0]} first; "
            "they do not belong to its config.json: download or export the model again"
        )
    return part.requires_grad_(False).eval()


def _from_pretrained(part_class: Any, path: str, name: str, arguments: dict[str, Any]) -> Any:
    try:
        return part_class.from_pretrained(path, **arguments)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        where = f"folder {path}" if Path(path).exists() else f"hub repository {path}"
        variant = f" (variant {arguments['variant']})" if arguments.get("variant") else ""
        raise UserError(
            f"cannot load {name!r} of {where}: expected a {part_class.__name__}{variant} as safetensors. "
            f"Copy or download it again, check --revision and --variant, or for .bin weights that you trust "
            f"give --allow_pickle. The reason given: {error}"
        ) from error


def _entry(source: ModelSource, name: str, index: dict[str, Any]) -> tuple[str, str]:
    library, class_name = index.get(name) or (None, None)
    if library is None or class_name is None:
        raise UserError(f"{source.path}: the pipeline has no {name!r} in its {INDEX}; a complete pipeline is needed")
    if Path(source.path).is_dir() and not Path(source.path, name).is_dir():
        raise UserError(f"{source.path} is incomplete: no folder {name!r}, which its {INDEX} names; copy it again")
    return library, class_name


def _class(library: str, class_name: str, path: str) -> Any:
    # only these two: a library name from a file must not decide what code is imported
    part_class = getattr(importlib.import_module(library), class_name, None) if library in _LIBRARIES else None
    if part_class is None:
        raise UserError(
            f"{path} needs the class {class_name} of {library}, which the installed diffusers and transformers "
            "do not have; a newer version may"
        )
    return part_class


_LIBRARIES = ("diffusers", "transformers")


def refuse_pickles(folder: Path, name: str) -> None:
    """Nothing, unless a local folder has no safetensors for the part called ``name``.

    Raises:
        UserError: there are only pickled weights, or none.
    """
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        pickles = sorted(file.name for pattern in ("*.bin", "*.ckpt", "*.pt", "*.pth") for file in folder.glob(pattern))
        weights_text = (
            f"only pickled weights ({', '.join(pickles)}), which can run any code while they load"
            if pickles
            else "none"
        )
        remedy = "load it and save it again as safetensors; for a base model that you trust there is --allow_pickle"
        raise UserError(
            f"{folder}: the weights of {name!r} are expected as *.safetensors, but there are {weights_text}. "
            + (f"To go on: {remedy}." if pickles else "The folder is incomplete: copy or download it again.")
        )


def _embedded() -> str:
    from dreamlora import tiny  # only looked for when it is used

    return str(tiny.pipeline_path())


def commit_of(path: str, file: str, revision: str | None, cache_dir: Path | None) -> str | None:
    """The commit that a revision of a hub repository stands for now; None for a folder, which has none.

    Offline it is the one that was downloaded last.

    Args:
        path: folder or hub repository.
        file: one that must be there.
        revision: branch, tag or commit; None: the default branch.
        cache_dir: where downloads are kept.

    Raises:
        UserError: as ``find_file``.
    """
    local_file = find_file(path, file, revision, cache_dir)
    return None if Path(path).is_dir() else local_file.parents[file.count("/")].name


def identity(name: str, path: str, commit: str | None) -> str:
    """A short name and what the files hold: ``name@fingerprint`` for folders, ``name@commit`` for the hub.

    Args:
        name: as the user gave it.
        path: folder or hub repository that it stands for.
        commit: of the repository; None for a folder.
    """
    return f"{name}@{commit}" if commit else f"{Path(name).resolve().name}@{fingerprint(Path(path))}"


def find_file(path: str, name: str, revision: str | None, cache_dir: Path | None) -> Path:
    """A file of a folder or hub repository; fetched if it is not here yet.

    Raises:
        UserError: no such folder, repository or file, or the hub cannot be reached.
    """
    return local_file(path, name) or _download(path, name, revision, cache_dir)


def _download(repository: str, name: str, revision: str | None, cache_dir: Path | None) -> Path:
    try:
        return Path(hf_hub_download(repository, name, revision=revision, cache_dir=cache_dir))
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        raise UserError(_explain(error, repository, name, revision)) from error


def _explain(error: Exception, repository: str, name: str, revision: str | None) -> str:
    nowhere = f"there is no folder {repository}"
    match error:
        case GatedRepoError():
            return (
                f"{repository} is gated: accept its terms at https://huggingface.co/{repository}, "
                "then log in with `hf auth login`"
            )
        case RepositoryNotFoundError():
            return f"{nowhere} and no such public hub repository; for a private one log in with `hf auth login`"
        case RevisionNotFoundError():
            return f"hub repository {repository} has no revision {revision!r}: check --revision"
        case LocalEntryNotFoundError():
            return (
                f"{nowhere}, and the hub cannot be reached (or HF_HUB_OFFLINE is set) and {name} of such a repository "
                "was not downloaded before: check the name, or the network"
            )
        case EntryNotFoundError():
            return f"hub repository {repository} has no {name}: a repository in the format of save_pretrained is needed"
        case HFValidationError():
            return f"{nowhere}, and it is not a hub name (owner/name) either"
        case _:
            return f"{nowhere}, and the hub did not deliver {name} of a repository of that name: {error}"
