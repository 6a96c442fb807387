"""Adapters that train become files: taken from PEFT's layers, and written as a run keeps them.

LoRAs and DoRAs are in diffusers' format. Its loader knows no LoHa, and LoKrs of few models: these are in kohya's, as
LyCORIS writes them, which ComfyUI, Forge and others read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import nn

from dreamlora.files import replacing
from dreamlora.lora.formats import FileContent, diffusers, kohya
from dreamlora.lora.metadata import serialised
from dreamlora.lora.names import CLIP_MODEL, ModelNames
from dreamlora.lora.pairs import TunedLayer, tuned_layers
from dreamlora.lora.weights import AdapterWeights, LayerWeights, lora_weights
from dreamlora.runfolder import LORA_FILE


def weights_of(modules: Mapping[str, nn.Module]) -> AdapterWeights:
    """The adapters of modules, on the CPU; modules without one are left out.

    A LoRA with a frozen start (``lora.offset``) becomes a plain one of twice the rank.

    Args:
        modules: by component name, whatever DDP or torch.compile put around them.
    """
    adapters: AdapterWeights = {}
    for component, module in modules.items():
        for layer in tuned_layers(module):
            name = layer.name.removeprefix(CLIP_MODEL)
            adapters.setdefault(component, {})[name] = _weights(layer)
    return adapters


def _weights(layer: TunedLayer) -> LayerWeights:
    if layer.pair is None:
        return _product(layer)
    down, up = (factor.cpu().contiguous() for factor in layer.pair.factors())
    magnitude = layer.pair.magnitude
    lengths = None if magnitude is None else magnitude.detach().cpu().flatten()
    return lora_weights(down, up, layer.scaling * len(down), lengths)


def _product(layer: TunedLayer) -> LayerWeights:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in layer.parameters.items()}
    weights = LayerWeights("loha" if "hada_w1_a" in tensors else "lokr", tensors, layer.alpha)
    if weights.scale == layer.scaling:
        return weights
    first = "lokr_w1" if weights.rank is None else next(iter(tensors))  # of two whole matrices no alpha is read
    return replace(weights, tensors={**tensors, first: tensors[first] * (layer.scaling / weights.scale)})


def save_lora(
    folder: Path,
    modules: Mapping[str, nn.Module],
    header: Mapping[str, str] | None = None,
    names: ModelNames | None = None,
) -> Path:
    """Write ``pytorch_lora_weights.safetensors``; LoRAs and DoRAs for the stock pipeline's ``load_lora_weights``.

    Args:
        folder: may not exist yet.
        modules: see ``weights_of``.
        header: what else the file says of itself.
        names: of the model's layers; LoRAs and DoRAs need none.
    """
    weights = weights_of(modules)
    pairs = all(each.kind == "lora" for layers in weights.values() for each in layers.values())
    content = diffusers.write(weights) if pairs or names is None else kohya.write(weights, names)
    return save_content(folder / LORA_FILE, content._replace(metadata={**(header or {}), **content.metadata}))


def save_content(file: Path, content: FileContent) -> Path:
    """Write a file of tensors; several names may stand for one tensor."""
    tensors = {name: tensor.clone() for name, tensor in content.tensors.items()}  # safetensors refuses shared memory
    with replacing(file) as temporary:
        temporary.write_bytes(serialised(tensors, content.metadata))
    return file
