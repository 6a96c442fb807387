"""LoRA files in and out, for the commands that make LoRAs of LoRAs and models."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from dreamlora import registry
from dreamlora.commands.interim import LoraFile, model_names, read_lora, read_weights
from dreamlora.commands.written_lora import Written
from dreamlora.errors import UserError
from dreamlora.lora.formats import FileContent
from dreamlora.lora.names import ModelNames
from dreamlora.lora.saving import save_content
from dreamlora.lora.weights import AdapterWeights

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
OWN_FORMAT = "diffusers"
"""The format of LoRAs that are made of no other."""
_FREE = 2**24
"""Bytes that are left free on the disk."""


@dataclass(frozen=True)
class Given:
    """A LoRA that was given.

    Attributes:
        file: looked into.
        weights: all that it holds.
        names: of the layers of its model; None: not known, and not needed to read it.
    """

    file: LoraFile
    weights: AdapterWeights
    names: ModelNames | None

    @property
    def label(self) -> str:
        """Its name, for a person; that of its folder where all files are called alike."""
        path = self.file.path
        return (
            path.name
            if path.name != "pytorch_lora_weights.safetensors"
            else f"{path.resolve().parent.name}/{path.name}"
        )


def read_given(path: Path, names: ModelNames | None, family: str | None = None, written: str | None = None) -> Given:
    """A LoRA of any program.

    Args:
        path: of a file, or of a folder with one.
        names: of the layers of its model; None: to be found out.
        family: that a person has named.
        written: format that it is to be written in; None: its own.

    Raises:
        UserError: see ``read_weights``; or it fits several families, or none.
    """
    file = read_lora(path)
    if names is None and family:
        names = model_names(family, {})
    if names is not None or file.format == OWN_FORMAT:
        return Given(file, read_weights(path, names), names)
    found = dict(_families(path, file))
    if not found:
        raise UserError(f"{file.path}: its layers are those of no family that is known: give --family")
    readings = list(found.values())
    alike = all(_layers(given) == _layers(readings[0]) for given in readings)
    if len(found) > 1 and not (alike and written in (None, file.format, OWN_FORMAT)):
        raise UserError(f"{file.path} may be for {' or '.join(found)}: give --family")
    return readings[0]


def _families(path: Path, file: LoraFile) -> Iterator[tuple[str, Given]]:
    """Those in whose names the file would be written again as it is, and what it is then."""
    tensors = {key for key in file.shapes if not key.endswith(".alpha")}
    for family in registry.names("families.layers"):
        names = model_names(family, {})
        try:
            weights = read_weights(path, names)
            again = registry.load("lora.formats", file.format).write(weights, names)
        except (UserError, ValueError):
            continue
        if again.tensors.keys() >= tensors:
            yield family, Given(file, weights, names)


def _layers(given: Given) -> set[tuple[str, str]]:
    return {(component, layer) for component, layers in given.weights.items() for layer in layers}


def check_output(output: Path, needed: int = 0) -> None:
    """Nothing, if something can be written there.

    Args:
        output: a file or folder.
        needed: bytes.

    Raises:
        UserError: something lies there, or the disk has too little room.
    """
    if output.exists() or output.is_symlink():
        raise UserError(f"--output {output}: something lies there already, and nothing is overwritten: name another")
    place = next(folder for folder in output.absolute().parents if folder.exists())
    if not place.is_dir():
        raise UserError(f"--output {output}: {place} is a file, and no folder")
    free = shutil.disk_usage(place).free
    if free < needed + _FREE:
        raise UserError(
            f"--output {output} takes {megabytes(needed)}, and the disk has room for {megabytes(free)}: make room "
            "there, or name another place"
        )


def check_lora_output(written: Written, format_name: str) -> None:
    """The same of a LoRA, which is one file.

    Raises:
        UserError: see ``check_output``; or the name is none of such a file.
    """
    if written.output.suffix != ".safetensors" and format_name != "peft":
        raise UserError(f"--output {written.output}: the name of a LoRA's file ends in .safetensors")
    check_output(written.output)


def content_of(
    weights: AdapterWeights, written: Written, format_name: str, names: ModelNames | None, metadata: Mapping[str, str]
) -> FileContent:
    """What a LoRA's file is to hold.

    Args:
        weights: of all layers.
        written: the options.
        format_name: of the file.
        names: of the layers of its model.
        metadata: of its header, besides what the format needs.

    Raises:
        UserError: the format cannot hold it; the message says why.
    """
    if written.dtype:
        weights = in_precision(weights, DTYPES[written.dtype])
    if names is None and format_name != OWN_FORMAT:
        raise UserError(f"--format {format_name} has names of its own for every family's layers: give --family")
    try:
        content = registry.load("lora.formats", format_name).write(weights, names)
    except ValueError as error:
        raise UserError(
            f"the format {format_name} cannot hold this LoRA: {error}. Give another --format: "
            f"{', '.join(registry.names('lora.formats'))}"
        ) from None
    return FileContent(content.tensors, {**metadata, **content.metadata})


def write_lora(written: Written, content: FileContent) -> None:
    """Write the file.

    Raises:
        UserError: a number is not finite any more.
        WriteError: the system refused.
    """
    for name, tensor in content.tensors.items():
        if not bool(tensor.isfinite().all()):
            raise UserError(
                f"{written.output}: {name} does not fit {str(tensor.dtype).removeprefix('torch.')}: give --dtype fp32"
            )
    save_content(written.output, content)


def in_precision(weights: AdapterWeights, dtype: torch.dtype) -> AdapterWeights:
    """All in another precision."""
    return {
        component: {layer: adapter.in_precision(dtype) for layer, adapter in layers.items()}
        for component, layers in weights.items()
    }


def megabytes(size: float) -> str:
    """Bytes, for a person."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
