"""What the parts of a pipeline are on disk or on the hub, by headers: no weights are read, none are fetched."""

from __future__ import annotations

import importlib.util
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dreamlora.archives import open_tensors
from dreamlora.errors import UserError
from dreamlora.interfaces import Family, ModelSource, Role
from dreamlora.models.building import empty_module, is_module
from dreamlora.models.fetching import Place
from dreamlora.models.loading import part_classes, place_of
from dreamlora.models.weights import DIFFUSERS, MOST_TENSORS, TRANSFORMERS, FileNames, Weights, find_weights, named_in

_SENTENCEPIECE = ".model"
_NEEDS = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}


@dataclass(frozen=True)
class PartFiles:
    """One part of a pipeline, or what is wrong with it.

    Attributes:
        role, name, part_class: in the pipeline.
        place: where it lies.
        size: of its weights' files, in bytes; 0 for what has none.
        tensors: in these files.
        numbers: in these files by their type, as safetensors has it ("BF16"); empty for pickles, which are not opened.
        here: whether the files are on this machine.
        problem: what keeps it from being loaded; None: nothing that is seen so.
    """

    role: Role
    name: str
    part_class: Any
    place: Place
    size: int = 0
    tensors: int = 0
    numbers: Mapping[str, int] = field(default_factory=dict)
    here: bool = True
    problem: str | None = None

    @property
    def parameters(self) -> int:
        """How many numbers its weights are."""
        return sum(self.numbers.values())

    @property
    def precision(self) -> str | None:
        """The type that most of its numbers have; None where that is not known."""
        return max(self.numbers, key=lambda kind: self.numbers[kind]) if self.numbers else None

    @property
    def weights(self) -> Weights:
        """For ``Weights.bounding``."""
        return Weights((), self.tensors or MOST_TENSORS, self.parameters or self.size)


def inventory(source: ModelSource, family: Family) -> list[PartFiles]:
    """All parts that the pipeline has, in the family's order.

    Raises:
        UserError: the pipeline lacks one, or has one of a class that the family does not know.
    """
    return [_part(source, role, name, part_class) for role, name, part_class in part_classes(source, family)]


def empty_part(parts: Sequence[PartFiles], name: str) -> nn.Module:
    """A part of the pipeline without its numbers."""
    part = next(part for part in parts if part.name == name)
    return empty_module(part.part_class, part.place, part.weights, torch.float32)


def _part(source: ModelSource, role: Role, name: str, part_class: Any) -> PartFiles:
    place = place_of(source, name)
    part = PartFiles(role, name, part_class, place)
    try:
        if is_module(part_class):
            size, headers, here = _weights(source, place, part_class)
            numbers: Counter[str] = Counter()
            for header in headers:
                numbers.update(header.numbers)
            tensors = sum(header.tensors for header in headers)
            return PartFiles(role, name, part_class, place, size, tensors, dict(numbers), here)
        if issubclass(part_class, PreTrainedTokenizerBase):
            return PartFiles(role, name, part_class, place, problem=_lacking_package(part_class, place))
    except UserError as error:
        return PartFiles(role, name, part_class, place, problem=str(error))
    return part


@dataclass(frozen=True)
class _Header:
    tensors: int
    numbers: Mapping[str, int]


def _weights(source: ModelSource, place: Place, part_class: Any) -> tuple[int, list[_Header], bool]:
    """Bytes of the files, their headers, and whether they are here.

    Raises:
        UserError: there are none that may be loaded.
    """
    names = TRANSFORMERS if issubclass(part_class, PreTrainedModel) else DIFFUSERS
    variant = source.variant if place.path == source.path else None
    if Path(place.path).is_dir() or _downloaded(place, names, variant):
        files = find_weights(place, names, variant, source.allow_pickle).files
        headers = [_header(file) for file in files if file.suffix == ".safetensors"]
        return sum(file.stat().st_size for file in files), headers, True
    return _on_hub(place, names, variant, source.allow_pickle)


def _downloaded(place: Place, names: FileNames, variant: str | None) -> bool:
    """Whether all files of the weights have been fetched from the hub before."""
    for name in names.safetensors(variant):
        file = place.downloaded(name)
        if file is not None:
            return not name.endswith(".json") or all(place.downloaded(shard) for shard in named_in(file, "safetensors"))
    return False


def _header(file: Path) -> _Header:
    numbers: Counter[str] = Counter()
    with open_tensors(file, most=MOST_TENSORS) as tensors:
        slices = [tensors.get_slice(name) for name in tensors.keys()]  # noqa: SIM118 - no iterator
        for tensor in slices:
            size = 1
            for side in tensor.get_shape():
                size *= side
            numbers[tensor.get_dtype()] += size
    return _Header(len(slices), numbers)


def _on_hub(place: Place, names: FileNames, variant: str | None, allow_pickle: bool) -> tuple[int, list[_Header], bool]:
    """The same of files that are to be fetched: the hub tells their sizes and headers.

    Raises:
        UserError: it has none that may be loaded, or cannot be reached.
    """
    sizes = place.listing()
    for name in names.safetensors(variant):
        if name in sizes:
            files = named_in(place.file(name), "safetensors") if name.endswith(".json") else (name,)
            missing = [file for file in files if file not in sizes]
            if missing:
                raise UserError(f"{place}: the hub repository lacks {missing[0]}, which {name} names: check --revision")
            headers = [_Header(*place.header_of(file)) for file in files]
            return sum(sizes[file] for file in files), headers, False
    pickles = [name for name in names.pickles(variant) if name in sizes]
    if pickles and allow_pickle:
        return sizes[pickles[0]], [], False
    there = ", ".join(sorted(name for name in sizes if name.endswith((".safetensors", ".bin")))[:3]) or "no weights"
    hint = "for .bin weights of a base model that you trust there is --allow_pickle" if pickles else "check --variant"
    wanted = names.safetensors(variant)[-1 if names.index_first else 0]
    raise UserError(f"{place}: expected {wanted} or several files with an index, found {there} on the hub: {hint}")


def _lacking_package(tokenizer_class: Any, place: Place) -> str | None:
    """What a tokenizer needs that is there in SentencePiece's format alone."""
    files = [name for name in tokenizer_class.vocab_files_names.values() if place.optional(name)]
    lacking = [package for module, package in _NEEDS.items() if not _is_installed(module)]
    if not files or not all(name.endswith(_SENTENCEPIECE) for name in files) or not lacking:
        return None
    return (
        f"{place} has its vocabulary in SentencePiece's format alone ({files[0]}), which needs "
        f"{' and '.join(lacking)}: pip install 'dreamlora[t5]', or give a tokenizer.json"
    )


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def problems_of(parts: Sequence[PartFiles]) -> Iterator[str]:
    """What keeps parts from being loaded, one sentence each."""
    yield from (part.problem for part in parts if part.problem)
