"""A pipeline's folder written anew, with the weights of some parts changed: everything that the stock pipeline loads,
and nothing else. Pickles, code and other variants of the weights stay behind.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dreamlora.errors import UserError
from dreamlora.files import make_folder, replacing_folder, write_atomically
from dreamlora.interfaces import ModelSource
from dreamlora.models.building import CONFIG
from dreamlora.models.checkpoint import headers_of
from dreamlora.models.configs import read_config
from dreamlora.models.fetching import Place
from dreamlora.models.loading import read_model_index
from dreamlora.models.local import INDEX
from dreamlora.models.rewriting import Rewriting, rewrite
from dreamlora.models.weights import DIFFUSERS, TRANSFORMERS, FileNames, find_weights

_SETTINGS = (".json", ".txt", ".model", ".jinja")
"""Endings of files that belong to a part besides its weights."""
_WEIGHTS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5")
_LICENCES = ("LICENSE", "LICENSE.md", "LICENSE.txt")


@dataclass(frozen=True)
class PipelinePart:
    """One entry of model_index.json.

    Attributes:
        name: of its folder.
        place: where it lies.
        settings: names of its files that are no weights.
        weights: their files; empty of a tokenizer.
        names: how these are called.
    """

    name: str
    place: Place
    settings: tuple[str, ...]
    weights: tuple[Path, ...]
    names: FileNames


def pipeline_parts(source: ModelSource) -> list[PipelinePart]:
    """All parts, fetched if they are not here; without those that there are as pickles alone and the pipeline can do
    without (a safety checker).

    Raises:
        UserError: a part is missing, or is there as a pickle alone.
    """
    index = read_model_index(source)
    entries = {name: entry for name, entry in index.items() if isinstance(entry, list) and any(entry)}
    parts = []
    for name, entry in entries.items():
        if len(entry) != 2 or not all(isinstance(word, str) for word in entry):
            continue  # a setting, such as the sides of something
        place = Place(source.path, source.revision, source.cache_dir, name)
        part = _part(source, name, place, DIFFUSERS if entry[0] == "diffusers" else TRANSFORMERS)
        if part:
            parts.append(part)
    return parts


_DISPENSABLE = ("safety_checker", "feature_extractor", "image_encoder")


def _part(source: ModelSource, name: str, place: Place, names: FileNames) -> PipelinePart | None:
    local = Path(place.path, place.folder)
    if Path(place.path).is_dir():
        there = [file.name for file in local.iterdir()] if local.is_dir() else []
    else:
        there = list(place.listing())
    if not there:
        return None
    settings = tuple(
        sorted(
            file for file in there if file.endswith(_SETTINGS) and not file.endswith(".index.json") and "/" not in file
        )
    )
    weights: tuple[Path, ...] = ()
    if any(file.endswith(_WEIGHTS) for file in there):
        try:
            weights = find_weights(place, names, source.variant, allow_pickle=False).files
        except UserError:
            if name not in _DISPENSABLE:
                raise
            return None
    return PipelinePart(name, place, settings, weights, names)


def write_pipeline(
    source: ModelSource,
    parts: Sequence[PipelinePart],
    folder: Path,
    rewritings: Mapping[str, Callable[[Path], Rewriting]],
    dtype: torch.dtype | None = None,
) -> None:
    """Write the folder, whole or not at all. What is in several files stays so.

    Args:
        source: the pipeline.
        parts: of ``pipeline_parts``.
        folder: which is not there.
        rewritings: by part, what is changed in each of its files.
        dtype: that these parts get; None: as they are.

    Raises:
        UserError: see ``rewriting.rewrite``.
        WriteError: the system refused.
    """
    index = read_model_index(source)
    kept = {part.name for part in parts}
    for name in _DISPENSABLE:
        if name in index and name not in kept:
            index[name] = [None, None]
    with replacing_folder(folder) as temporary:
        for part in parts:
            own = make_folder(temporary / part.name)
            for name in part.settings:
                shutil.copyfile(part.place.file(name), own / name)
            if dtype and part.name in rewritings:
                _tell_dtype(own / CONFIG, dtype)
            _write_weights(part, own, source.variant, rewritings.get(part.name))
        for name in _LICENCES:
            if (found := Path(source.path, name)).is_file():
                shutil.copyfile(found, temporary / name)
        write_atomically(temporary / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _tell_dtype(config: Path, dtype: torch.dtype) -> None:
    """Where a config says in which precision the weights are, as those of transformers do, and load in it."""
    content = read_config(config)
    told = content.keys() & {"dtype", "torch_dtype"}
    if told:
        named = dict.fromkeys(told, str(dtype).removeprefix("torch."))
        write_atomically(config, json.dumps(content | named, indent=2, sort_keys=True) + "\n")


def _write_weights(
    part: PipelinePart, folder: Path, variant: str | None, rewriting: Callable[[Path], Rewriting] | None
) -> None:
    """Under the names that they have without the variant, which is the only one there."""
    weight_map: dict[str, str] = {}
    total = 0
    for file in part.weights:
        name = file.name.replace(f".{variant}", "", 1) if variant else file.name
        if rewriting:
            total += rewrite(file, folder / name, rewriting(file))
        else:
            shutil.copyfile(file, folder / name)
            total += file.stat().st_size
        if len(part.weights) > 1:
            weight_map |= dict.fromkeys(headers_of(file), name)
    if weight_map:
        content: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_atomically(folder / f"{part.names.stem}.safetensors.index.json", json.dumps(content, indent=2) + "\n")


def bytes_of(parts: Sequence[PipelinePart], converted: Mapping[str, torch.dtype]) -> int:
    """Of the weights, about; in other precisions some of them.

    Args:
        parts: of ``pipeline_parts``.
        converted: by part.
    """
    total = 0
    for part in parts:
        for file in part.weights:
            if part.name in converted:
                numbers = (torch.Size(header.shape).numel() for header in headers_of(file).values())
                total += sum(numbers) * converted[part.name].itemsize
            else:
                total += file.stat().st_size
    return total
