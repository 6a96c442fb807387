"""Weights of a model: which files hold them, and how much they hold. Safetensors, unless pickles are allowed."""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Len
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from typing_extensions import TypedDict

from dreamlora.archives import open_tensors
from dreamlora.config.model import INSTEAD_OF_QUANTIZED
from dreamlora.errors import UserError
from dreamlora.models.fetching import Place
from dreamlora.reading import Schema, UnreadableError, read_json, shortened

INDEX_BYTES = 2**24
MOST_TENSORS = 100_000
_NUMBERS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_COUNTERS = {"I64", "I32"}
"""Positions, which SD 1.5's text encoder stores."""


class _Index(TypedDict):
    metadata: dict[str, Any]
    weight_map: Annotated[dict[str, str], Len(1, MOST_TENSORS)]


_INDEX = Schema(_Index)


@dataclass(frozen=True)
class FileNames:
    """How a library names the files of a model.

    Attributes:
        stem: of safetensors files.
        pickle: the name of a pickled file.
        index_first: whether an index of several files goes before a whole file.
    """

    stem: str
    pickle: str
    index_first: bool

    def safetensors(self, variant: str | None) -> tuple[str, ...]:
        """Of a whole file and of indices, in the order in which they are looked for."""
        whole = varied(f"{self.stem}.safetensors", variant)
        index = varied(f"{self.stem}.safetensors.index.json", variant)
        if not self.index_first:
            return whole, index
        old = (f"{self.stem}.safetensors.{variant}.index.json",) if variant else ()  # as diffusers once wrote it
        return index, *old, whole

    def pickles(self, variant: str | None) -> tuple[str, ...]:
        """The same for pickles; diffusers reads no index of these."""
        whole = varied(self.pickle, variant)
        return (whole,) if self.index_first else (whole, varied(f"{self.pickle}.index.json", variant))


DIFFUSERS = FileNames("diffusion_pytorch_model", "diffusion_pytorch_model.bin", index_first=True)
TRANSFORMERS = FileNames("model", "pytorch_model.bin", index_first=False)


def varied(name: str, variant: str | None) -> str:
    """``model.fp16.safetensors``: the variant goes before the ending."""
    stem, _, ending = name.rpartition(".")
    return f"{stem}.{variant}.{ending}" if variant else name


@dataclass(frozen=True)
class Weights:
    """The files of one model, each looked through.

    Attributes:
        files: all of safetensors, or all of pickles.
        tensors: how many there are at most.
        numbers: how many these hold at most.
    """

    files: tuple[Path, ...]
    tensors: int
    numbers: int

    def read(self) -> dict[str, Tensor]:
        """All tensors by name; their numbers come from the disk when they are first used."""
        return {name: tensor for file in self.files for name, tensor in read_tensors(file).items()}

    @contextmanager
    def bounding(self, config: Path) -> Iterator[None]:
        """No model is built in here that has much more than these files hold; without such a bound, a number in a
        config makes layers until memory or patience ends.

        Raises:
            UserError: it would have more.
        """
        tensors = numbers = 0

        def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            nonlocal tensors, numbers
            tensors, numbers = tensors + 1, numbers + (0 if parameter is None else parameter.numel())
            # twice, as filling counts again, and twice that, for those that are tied, or missing and named later
            if tensors > 4 * self.tensors + 100 or numbers > 4 * self.numbers + 2**20:
                raise UserError(
                    f"{config} asks for far more than the {self.numbers} numbers in {self.tensors} tensors that its "
                    "weights hold: they do not belong together; download or export the model again"
                )

        handle = register_module_parameter_registration_hook(count)
        try:
            yield
        finally:
            handle.remove()


def find_weights(place: Place, names: FileNames, variant: str | None, allow_pickle: bool) -> Weights:
    """The files of the model at a place, fetched and looked through.

    Raises:
        UserError: there are none but pickles, an index names what it may not, or a file is none of safetensors.
    """
    for name in names.safetensors(variant):
        file = place.optional(name)
        if file is not None:
            files = _fetched(place, file, "safetensors") if name.endswith(".json") else (file,)
            headers = [read_header(shard) for shard in files]
            return Weights(files, sum(map(len, headers)), sum(sum(header.values()) for header in headers))
    for name in names.pickles(variant) if allow_pickle else ():
        file = place.optional(name)
        if file is not None:
            files = _fetched(place, file, "bin") if name.endswith(".json") else (file,)
            return Weights(files, MOST_TENSORS, sum(shard.stat().st_size for shard in files))
    raise UserError(_missing(place, names, variant))


def read_header(file: Path) -> dict[str, int]:
    """How many numbers each tensor of a safetensors file holds, by name.

    Raises:
        FileNotFoundError: there is no such file.
        UnreadableError: it is none of safetensors, its header is larger than any real one, or it holds what no model
            is made of.
    """
    with open_tensors(file, most=MOST_TENSORS) as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - no iterator
        kinds = {name: tensor.get_dtype() for name, tensor in slices.items()}
        sizes = {name: math.prod(tensor.get_shape()) for name, tensor in slices.items()}
    for name, kind in kinds.items():
        if kind not in _NUMBERS | _COUNTERS:
            raise UnreadableError(file, f"{shortened(name)} is of type {kind}: {INSTEAD_OF_QUANTIZED}")
    return sizes


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a pickle, from which torch reads tensors and no other objects.

    Raises:
        Exception: of many kinds, as the libraries have it.
    """
    if file.suffix == ".safetensors":
        return load_file(file)
    tensors: dict[str, Tensor] = torch.load(
        file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file) or None
    )
    return tensors


def _fetched(place: Place, index: Path, ending: str) -> tuple[Path, ...]:
    return tuple(place.file(name) for name in named_in(index, ending))


def named_in(index: Path, ending: str) -> tuple[str, ...]:
    """The files that an index names: in its own folder, and with this ending.

    Raises:
        UnreadableError: it is no index, or names others.
    """
    content = read_json(index, _INDEX, most=INDEX_BYTES)
    names = sorted(set(content["weight_map"].values()))
    for name in names:
        if not re.fullmatch(rf"[A-Za-z0-9_][A-Za-z0-9_.-]{{0,200}}\.{ending}", name):
            raise UnreadableError(
                index, f"it names {shortened(name)}, where only files <name>.{ending} beside it may be"
            )
    return tuple(names)


def _missing(place: Place, names: FileNames, variant: str | None) -> str:
    whole = varied(f"{names.stem}.safetensors", variant)
    wanted = f"{place}: the weights are expected as {whole}, or as several files with an index"
    wanted += f" (variant {variant})" if variant else ""
    if not Path(place.path).is_dir():
        return (
            f"{wanted}, and the hub repository has none, or cannot be reached: check --revision and --variant; for "
            ".bin weights of a base model that you trust there is --allow_pickle"
        )
    folder = Path(place.path, place.folder)
    others = sorted(file.name for file in folder.glob("*.safetensors"))
    if others:
        return f"{wanted}, but there are {', '.join(others[:3])}: check --variant, or copy or download it again"
    pickles = sorted(file.name for end in ("bin", "ckpt", "pt", "pth") for file in folder.glob(f"*.{end}"))
    if pickles:
        return (
            f"{wanted}, but there are only pickled weights ({', '.join(pickles[:3])}), which can run any code while "
            "they load. To go on: load it and save it again as safetensors; for a base model that you trust there is "
            "--allow_pickle."
        )
    return f"{wanted}, but there are none. The folder is incomplete: copy or download it again."
