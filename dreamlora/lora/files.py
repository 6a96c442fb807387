"""LoRA files of any program: found, looked into, and read as ``AdapterWeights``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamlora import registry
from dreamlora.archives import open_tensors
from dreamlora.errors import UserError
from dreamlora.lora.converter import read_through_diffusers
from dreamlora.lora.formats import FileContent, diffusers
from dreamlora.lora.metadata import TIMES
from dreamlora.lora.names import ModelNames
from dreamlora.lora.origin import made_for
from dreamlora.lora.peft_folder import settings_beside, tensors_in
from dreamlora.lora.recognise import format_of
from dreamlora.lora.weights import AdapterWeights
from dreamlora.lora.whole import ALPHA, MARKS, NO_ALPHA, PAIR, is_part, refuse_odd_values, refuse_other_parts
from dreamlora.runfolder import LORA_FILE, RunFolder

_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_ALWAYS = 2**26
"""Numbers that may be in the LoRA of a model however small."""


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file that was opened and looks right.

    Attributes:
        path: the file itself.
        format: name of its format in ``lora/formats``; empty: none knows it, but diffusers may.
        shapes: shape of every tensor by key.
        metadata: the file's header.
        files: more of one of a folder of PEFT's, each with what stands before its keys above.
    """

    path: Path
    format: str
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]
    files: dict[str, Path]

    def tensors(self) -> dict[str, Tensor]:
        """Parts of adapters, by key."""
        tensors: dict[str, Tensor] = {}
        for before, file in self.files.items():
            with open_tensors(file) as opened:
                keys = [key for key in opened.keys() if is_part(key)]  # noqa: SIM118 - no iterator
                tensors |= {before + key: opened.get_tensor(key) for key in keys}
        return tensors


def read_lora(path: Path) -> LoraFile:
    """Look into a LoRA: a file, a folder of PEFT's, or one with ``pytorch_lora_weights.safetensors`` or one other.

    Only the header is read (and what is no part of an adapter), never a pickle.

    Raises:
        UserError: nothing there, not safetensors, not a LoRA, or more than can be applied (OFT, whole weights, ...).
    """
    files = tensors_in(Path(path)) or {"": _find(Path(path))}
    shapes: dict[str, tuple[int, ...]] = {}
    metadata: dict[str, str] = {}
    for before, file in files.items():
        with open_tensors(file) as opened:
            found = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118 - no iterator
            metadata |= (opened.metadata() or {}) | settings_beside(file, before)
            if not any(MARKS.search(key) for key in found):
                example = next(iter(found), "no tensors at all")
                raise UserError(
                    f"{file} is not a LoRA: no lora_A/lora_B, lora_down/lora_up, hada_ or lokr_ in its names (it has "
                    f"{example})"
                )
            refuse_other_parts(file, found, opened.get_tensor)
        shapes |= {before + key: shape for key, shape in found.items()}
    first = next(iter(files.values()))
    form = format_of([key for key in shapes if is_part(key)])
    return LoraFile(first, form if form in registry.names("lora.formats") else "", shapes, metadata, files)


def read_weights(path: Path, model: ModelNames | None, pipeline: Any = None) -> AdapterWeights:
    """All that a LoRA does, whatever program wrote it.

    Args:
        path: see ``read_lora``.
        model: names of the layers of the model that it is for; None: they are not known.
        pipeline: a stock one of this model, whose class reads what no format here knows.

    Raises:
        UserError: see ``read_lora``; or a name is no layer's of this model, parts do not belong together, numbers
            cannot be computed with, or alphas are given twice.
    """
    lora = read_lora(path)
    if pipeline is not None:
        _refuse_too_much(pipeline, lora)
    tensors = lora.tensors()
    refuse_odd_values(lora.path, tensors)
    content = FileContent({name: _computable(tensor) for name, tensor in tensors.items()}, lora.metadata)
    try:
        return _sound(lora.path, _read(lora, content, model, pipeline))
    except ValueError as error:
        raise UserError(f"{lora.path}: {error}{made_for(content, lora.format)}") from None


def _read(lora: LoraFile, content: FileContent, model: ModelNames | None, pipeline: Any) -> AdapterWeights:
    """By its format; through diffusers what has none here, is of a model whose names are not known, or is old.

    Raises:
        ValueError: its format cannot read it.
        UserError: diffusers cannot.
    """
    own = lora.format == registry.name_of(diffusers)
    reason = ValueError(f"its names are not known, such as {next(iter(content.tensors))}")
    try:
        if own:
            return diffusers.read(content)
        if lora.format and model is not None and model.layers.originals:
            return diffusers.with_settings(registry.load("lora.formats", lora.format).read(content, model), content)
    except ValueError as error:
        reason = error
        if not own:
            raise
    if pipeline is None or not all(PAIR.search(name) or ALPHA.match(name) for name in content.tensors):
        raise reason
    try:
        return diffusers.with_settings(read_through_diffusers(pipeline, lora.path, content.tensors), content)
    except UserError:
        if own:
            raise reason from None
        raise


def _computable(tensor: Tensor) -> Tensor:
    """torch can store 8-bit floats, and do nothing else with them."""
    return tensor.float() if tensor.dtype in _FLOAT8 else tensor


def _sound(path: Path, adapters: AdapterWeights) -> AdapterWeights:
    for component, layers in adapters.items():
        for layer, adapter in layers.items():
            if adapter.alpha <= 0:
                raise UserError(NO_ALPHA.format(path, f"{component}.{layer}", adapter.alpha))
    return adapters


def same_lora(first: Path, second: Path) -> bool:
    """Whether two files hold the same tensors and metadata but for their dates. Their bytes may differ: safetensors
    shuffles metadata.

    Raises:
        UserError: one of them is no file of tensors.
    """
    with open_tensors(first) as one, open_tensors(second) as other:
        keys = sorted(one.keys())
        return (
            keys == sorted(other.keys())
            and _undated(one.metadata()) == _undated(other.metadata())
            and all(_same(one.get_tensor(key), other.get_tensor(key)) for key in keys)
        )


def _undated(metadata: dict[str, str] | None) -> dict[str, str]:
    return {key: value for key, value in (metadata or {}).items() if key not in TIMES}


def _same(one: Tensor, other: Tensor) -> bool:
    """To the last bit, whatever their type can do."""
    alike = one.shape == other.shape and one.dtype == other.dtype
    return alike and torch.equal(*(tensor.flatten().view(torch.uint8) for tensor in (one, other)))


def _find(path: Path) -> Path:
    if path.is_dir():
        if (path / LORA_FILE).is_file():
            return path / LORA_FILE
        if RunFolder(path).holds_run():
            raise UserError(_unfinished(RunFolder(path)))
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "no *.safetensors"
            raise UserError(f"{path}: expected {LORA_FILE}, found {names}; name the file itself")
        return files[0]
    if not path.is_file():
        raise UserError(f"no such LoRA file or folder: {path}")
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: LoRAs are read as .safetensors only, as pickles can run any code while they load")
    return path


def _unfinished(run: RunFolder) -> str:
    """What to give instead of a run without a result."""
    best = [run.best] if (run.best / LORA_FILE).is_file() else []
    there = [*best, *(run.checkpoint_dir(step) for step in run.checkpoint_steps()[-1:])]
    if not there:
        return f"{run.path} is a run without a LoRA yet: it has no checkpoint"
    return f"{run.path} is a run that has not ended: give a checkpoint, such as {' or '.join(map(str, there))}"


def _refuse_too_much(pipeline: Any, lora: LoraFile) -> None:
    """Refuse more numbers than the whole model has, before they are read."""
    parts = (getattr(pipeline, name, None) for name in pipeline._lora_loadable_modules)
    size = sum(p.numel() for part in parts if part is not None for p in part.parameters())
    numbers = sum(map(math.prod, lora.shapes.values()))
    if numbers > max(size, _ALWAYS):
        raise UserError(f"{lora.path} holds {numbers:,} numbers, and the model that it is for {size:,}: it is no LoRA")
