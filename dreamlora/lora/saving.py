"""Adapters that train become files: taken from PEFT's layers, and written as a run keeps them, in diffusers' format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import nn

from dreamlora.files import replacing
from dreamlora.lora.formats import FileContent, diffusers
from dreamlora.lora.metadata import serialised
from dreamlora.lora.pairs import adapted_layers
from dreamlora.lora.weights import AdapterWeights, lora_weights
from dreamlora.runfolder import LORA_FILE

_CLIP_MODEL = "text_model."


def weights_of(modules: Mapping[str, nn.Module]) -> AdapterWeights:
    """The adapters of modules, on the CPU; modules without one are left out.

    A LoRA with a frozen start (``lora.offset``) becomes a plain one of twice the rank.

    Args:
        modules: by component name, whatever DDP or torch.compile put around them.
    """
    adapters: AdapterWeights = {}
    for component, module in modules.items():
        for layer in adapted_layers(module):
            down, up = (factor.cpu().contiguous() for factor in layer.factors())
            name = layer.name.removeprefix(_CLIP_MODEL)
            adapters.setdefault(component, {})[name] = lora_weights(down, up, layer.scaling * len(down))
    return adapters


def save_lora(folder: Path, modules: Mapping[str, nn.Module], header: Mapping[str, str] | None = None) -> Path:
    """Write ``pytorch_lora_weights.safetensors`` as the stock pipeline's ``load_lora_weights`` reads it.

    Args:
        folder: may not exist yet.
        modules: see ``weights_of``.
        header: what else the file says of itself.
    """
    content = diffusers.write(weights_of(modules))
    return save_content(folder / LORA_FILE, content._replace(metadata={**(header or {}), **content.metadata}))


def save_content(file: Path, content: FileContent) -> Path:
    """Write a file of tensors; several names may stand for one tensor."""
    tensors = {name: tensor.clone() for name, tensor in content.tensors.items()}  # safetensors refuses shared memory
    with replacing(file) as temporary:
        temporary.write_bytes(serialised(tensors, content.metadata))
    return file
