"""Until the reader of all formats is there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dreamlora import registry
from dreamlora.archives import open_tensors
from dreamlora.errors import UserError
from dreamlora.lora.files import _find
from dreamlora.lora.formats import FileContent, _factors
from dreamlora.lora.names import ModelNames
from dreamlora.lora.settings import settings_of
from dreamlora.lora.weights import AdapterWeights


class LoraFile:
    def __init__(self, path, format, shapes, metadata):
        self.path, self.format, self.shapes, self.metadata = path, format, shapes, metadata


def model_names(family: str, config: Mapping[str, Any]) -> ModelNames | None:
    if family not in registry.names("families.layers"):
        return None
    names: ModelNames = registry.load("families.layers", family).names(config)
    return names


def read_lora(path: Path) -> LoraFile:
    file = _find(path)
    with open_tensors(file) as opened:
        shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}
        metadata = opened.metadata() or {}
    name = next((n for n in registry.names("lora.formats") if registry.load("lora.formats", n).recognises(shapes)), "")
    if not name:
        raise UserError(f"{file} is not a LoRA")
    return LoraFile(file, name, shapes, metadata)


def read_weights(path: Path, model: ModelNames | None, pipeline=None) -> AdapterWeights:
    lora = read_lora(path)
    with open_tensors(lora.path) as opened:
        tensors = {key: opened.get_tensor(key) for key in lora.shapes}
    content = FileContent(tensors, lora.metadata)
    try:
        if lora.format != "diffusers":
            return registry.load("lora.formats", lora.format).read(content, model)
        settings = settings_of(lora.path, lora.metadata)
        adapters: AdapterWeights = {}
        for name, factors in _factors.by_layer(tensors).items():
            component, _, layer = name.partition(".")
            layer = layer.removeprefix("text_model.")
            weights = _factors.weights_of(name, factors)
            if component in settings:
                from dataclasses import replace

                weights = replace(weights, alpha=settings[component].alpha_of(layer, weights.rank))
            adapters.setdefault(component, {})[layer] = weights
        return adapters
    except ValueError as error:
        raise UserError(f"{lora.path}: {error}") from None
