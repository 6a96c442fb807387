"""LoRAs into the weights of a model: one tensor after the other, in float32, rounded once to the model's precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dreamlora.archives import open_tensors
from dreamlora.commands.base_model import BaseModel, open_model
from dreamlora.commands.headers import of_model
from dreamlora.commands.lora_files import Given, check_output, read_given
from dreamlora.commands.merge.flags import MergeConfig
from dreamlora.config import Model
from dreamlora.errors import UserError
from dreamlora.lora.low_rank import shape_of
from dreamlora.lora.merging import Weighted, added, fits
from dreamlora.models.checkpoint import LayerWeight, refuse_quantised
from dreamlora.models.copying import bytes_of, write_pipeline
from dreamlora.models.local import is_single_file
from dreamlora.models.parts import DTYPES
from dreamlora.models.rewriting import Rewriting, rewrite

_FILE = ".safetensors"

Parts = list[tuple[LayerWeight, list[Weighted]]]
"""Layers of a tensor, and what is added to each."""


def merge_into_model(config: MergeConfig) -> dict[str, Any]:
    """See ``merge.merge``."""
    output = config.written.output
    check_output(output)
    base = _open(config)
    loras = [read_given(path, base.names) for path in config.lora]
    plan = _plan(base, loras, config.strengths)
    parts = [(lora.label, strength) for lora, strength in zip(loras, config.strengths, strict=True)]
    dtype = DTYPES[config.written.dtype] if config.written.dtype else None
    check_output(output, _size(base, dtype))
    rounding = _Rounding()
    with tqdm(total=len(plan), desc="merging", unit="tensor", delay=3, leave=False) as bar:

        def rewriting(file: Path) -> Rewriting:
            changes = {name: _change(own, dtype, rounding, bar) for (its, name), own in plan.items() if its == file}
            return Rewriting(changes, dtype, _converted(base, file), _metadata(file, parts))

        if base.pipeline:
            changed = {component for component, files in base.files.items() if dtype or _touches(plan, files)}
            write_pipeline(base.pipeline, base.parts, output, dict.fromkeys(changed, rewriting), dtype)
        else:
            rewrite(Path(base.path), output, rewriting(Path(base.path)))
    return {
        "base": base.path,
        "family": base.family,
        "loras": [_of_lora(lora, strength) for lora, strength in zip(loras, config.strengths, strict=True)],
        "output": str(output),
        "precision": _precisions(base, dtype),
        "rounding_error": rounding.relative,
    }


def _open(config: MergeConfig) -> BaseModel:
    """The base model: a folder for a folder, a file for a file."""
    path = str(config.pretrained_model_name_or_path)
    to_file = config.written.output.suffix == _FILE
    if to_file and not is_single_file(path):
        raise UserError(
            f"--output {config.written.output} is a single file, and {path} is none: a model is written as what it is; "
            "give a folder"
        )
    model = Model(
        pretrained_model_name_or_path=path,
        family=config.family,
        revision=config.revision,
        variant=config.variant,
        cache_dir=config.cache_dir,
    )
    return open_model(model, as_folder=not to_file)


def _plan(base: BaseModel, loras: list[Given], strengths: tuple[float, ...]) -> dict[tuple[Path, str], Parts]:
    """By file and tensor, what is added where.

    Raises:
        UserError: a layer is not there, or of another size; or it is quantised.
    """
    adapters: dict[tuple[str, str], list[Weighted]] = {}
    for lora, strength in zip(loras, strengths, strict=True):
        for component, layers in lora.weights.items():
            for layer, adapter in layers.items():
                _check(base, lora, component, layer)
                adapters.setdefault((component, layer), []).append((adapter, strength))
    plan: dict[tuple[Path, str], Parts] = {}
    for (component, layer), several in adapters.items():
        place = base.layers[component][layer]
        plan.setdefault((place.file, place.tensor), []).append((place, several))
    for files in base.files.values():
        for file, headers in files.items():
            refuse_quantised(file, headers, (name for name in headers if (file, name) in plan))
    return plan


def _check(base: BaseModel, lora: Given, component: str, layer: str) -> None:
    if component not in base.layers:
        raise UserError(f"{lora.file.path} is also for the {component}, and {base.path} has none: give the whole model")
    place = base.layers[component].get(layer)
    wrong = None
    if place is None:
        wrong = f"the {component} has no layer {layer}"
    elif not fits(lora.weights[component][layer], place.shape):
        shape = shape_of(lora.weights[component][layer])
        wrong = f"{component}.{layer} has weights of {place.shape}, and the LoRA is for {shape}"
    if wrong:
        raise UserError(f"{lora.file.path} does not fit {base.path}: {wrong}. Was it trained on another model?")


@dataclass
class _Rounding:
    """What rounding to the model's precision changes, beside what the LoRAs do: squares of norms."""

    lost: float = 0.0
    whole: float = 0.0

    @property
    def relative(self) -> float:
        """Of the LoRAs' changes."""
        return math.sqrt(self.lost / self.whole) if self.whole else 0.0

    def count(self, before: Tensor, after: Tensor, dtype: torch.dtype) -> None:
        """One tensor more."""
        self.lost += float((after.to(dtype).to(after.dtype) - after).square().sum(dtype=torch.float64))
        self.whole += float((after - before).square().sum(dtype=torch.float64))


def _change(parts: Parts, dtype: torch.dtype | None, rounding: _Rounding, bar: Any) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        whole = tensor.clone() if tensor.dtype == torch.float64 else tensor.to(torch.float32, copy=True)
        for place, adapters in parts:
            place.put(whole, added(place.of(whole), adapters))
        rounding.count(tensor, whole, dtype or tensor.dtype)
        bar.update()
        return whole

    return change


def _converted(base: BaseModel, file: Path) -> Callable[[str], bool]:
    """Which tensors of a file get another precision: those of the denoiser and text encoders."""
    names = {name for files in base.files.values() for own, headers in files.items() if own == file for name in headers}
    return names.__contains__


def _metadata(file: Path, parts: list[tuple[str, float]]) -> dict[str, str]:
    with open_tensors(file) as tensors:
        own = dict(tensors.metadata() or {})
    return of_model(own, parts)


def _touches(plan: Mapping[tuple[Path, str], Parts], files: Mapping[Path, Any]) -> bool:
    return any(file in files for file, _ in plan)


def _size(base: BaseModel, dtype: torch.dtype | None) -> int:
    if base.pipeline:
        return bytes_of(base.parts, dict.fromkeys(base.files, dtype) if dtype else {})
    size = Path(base.path).stat().st_size
    return 2 * size if dtype == torch.float32 else size


def _of_lora(lora: Given, strength: float) -> dict[str, Any]:
    layers = {component: len(own) for component, own in lora.weights.items()}
    kinds = {"dora" if a.magnitude is not None else a.kind for own in lora.weights.values() for a in own.values()}
    return {"name": lora.label, "strength": strength, "kinds": sorted(kinds), "layers": layers}


def _precisions(base: BaseModel, dtype: torch.dtype | None) -> dict[str, str]:
    """Of each component whose layers may have changed: the type that most tensors have."""
    found = {}
    for component, files in base.files.items():
        kinds = [header.kind for headers in files.values() for header in headers.values()]
        found[component] = max(set(kinds), key=kinds.count)
    return dict.fromkeys(found, str(dtype).removeprefix("torch.")) if dtype else found
