"""LoRA files in and out, for the commands that make LoRAs of LoRAs and models."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dreamlora import registry
from dreamlora.commands.written_lora import Written
from dreamlora.errors import UserError
from dreamlora.lora import exporting
from dreamlora.lora.embeddings import files_beside
from dreamlora.lora.exporting import is_folder, is_nameless
from dreamlora.lora.files import LoraFile, read_lora, read_weights
from dreamlora.lora.formats import FileContent
from dreamlora.lora.formats.peft import TENSORS
from dreamlora.lora.low_rank import shape_of
from dreamlora.lora.names import ModelNames, model_names
from dreamlora.lora.origin import families_of
from dreamlora.lora.weights import AdapterWeights
from dreamlora.models.parts import DTYPES
from dreamlora.runfolder import LORA_FILE

_FREE = 2**24
"""Bytes that are left free on the disk."""

logger = logging.getLogger(__name__)


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
        return path.name if path.name not in (LORA_FILE, TENSORS) else f"{path.resolve().parent.name}/{path.name}"


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
    tell_of_embeddings(file)
    if names is None and family:
        names = model_names(family, {})
    if names is not None or is_nameless(file.format):
        return Given(file, read_weights(path, names), names)
    families = families_of(FileContent(file.tensors(), file.metadata), file.format)
    if not families:
        read_weights(path, None)
        raise UserError(f"{file.path}: no model that is known has its layers: give --family")
    readings = [Given(file, read_weights(path, known), known) for known in _names_of(families)]
    alike = all(_layers(given) == _layers(readings[0]) for given in readings)
    if len(readings) > 1 and not (alike and (written in (None, file.format) or is_nameless(str(written)))):
        raise UserError(f"{file.path}: its layers may be those of {', '.join(families)}: give --family")
    return readings[0]


def tell_of_embeddings(lora: LoraFile) -> None:
    """Warn of those of new tokens that lie beside a LoRA: what is made of it has none."""
    beside = files_beside(lora.path)
    if beside:
        logger.warning(
            "%s needs the embeddings of its new tokens too, which stay where they are: %s",
            *(lora.path, ", ".join(map(str, beside))),
        )


def refuse_unknown_kernels(lora: Given) -> None:
    """Nothing, if what every adapter would be as a LoRA is known without the base model.

    Raises:
        UserError: one is of a convolution, whose kernel its factors do not tell.
    """
    for component, layers in lora.weights.items():
        for layer, adapter in layers.items():
            if "conv" in layer.rpartition(".")[2] and len(shape_of(adapter)) == 2:
                raise UserError(
                    f"{lora.file.path}: how large the kernel of the convolution {component}.{layer} is, its "
                    f"{adapter.kind} does not tell: merge it into its base model, and extract a LoRA"
                )


def _names_of(families: Iterable[str]) -> Iterator[ModelNames]:
    for family in families:
        names = model_names(family, {})
        if names:
            yield names


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
            f"--output {output} needs {megabytes(needed + _FREE)} of free disk, and there are {megabytes(free)}: make "
            "room there, or name another place"
        )


def check_lora_output(written: Written, form: str) -> None:
    """The same of a LoRA.

    Raises:
        UserError: see ``check_output``; or its name is none of such a file or folder.
    """
    if (written.output.suffix == ".safetensors") == is_folder(form):
        what = "a folder" if is_folder(form) else "a .safetensors file"
        raise UserError(f"--output {written.output}: a LoRA in the format {form} is {what}")
    check_output(written.output)


def content_of(
    weights: AdapterWeights, written: Written, form: str, names: ModelNames | None, metadata: Mapping[str, str]
) -> FileContent:
    """What a LoRA's file is to hold.

    Args:
        weights: of all layers.
        written: the options.
        form: the format.
        names: of the layers of its model.
        metadata: of its header, besides what the format needs.

    Raises:
        UserError: the format or the precision cannot hold it; the message says why.
    """
    if names is None and not is_nameless(form):
        raise UserError(f"--format {form} has names of its own for every family's layers: give --family")
    try:
        content = exporting.written(weights, form, names, DTYPES[written.dtype] if written.dtype else None)
    except ValueError as error:
        others = ", ".join(name for name in registry.names("lora.formats") if name != form)
        raise UserError(f"the format {form} cannot hold this LoRA: {error}. Other formats: {others}") from None
    return FileContent(content.tensors, {**metadata, **content.metadata})


def bytes_at(path: Path) -> int:
    """Of a file, or of all in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def megabytes(size: float) -> str:
    """Bytes, for a person."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
