"""diffusers' files, as ``save_lora_weights`` writes them: "unet." and PEFT's names; alphas are in the metadata."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from dreamlora.lora.formats import FileContent, _factors
from dreamlora.lora.names import CLIP_MODEL, ModelNames
from dreamlora.lora.settings import METADATA_KEY, Settings, settings_of, whole
from dreamlora.lora.targets import patterns
from dreamlora.lora.weights import AdapterWeights, LayerWeights

_ENDS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}


def read(content: FileContent, model: ModelNames | None = None) -> AdapterWeights:
    """See ``Format.read``; which layers the model has does not matter.

    Raises:
        ValueError: see there; or the metadata does not go with the tensors.
    """
    adapters: AdapterWeights = {}
    for name, factors in _factors.by_layer(content.tensors).items():
        component, _, layer = name.partition(".")
        if component.startswith("text_encoder"):
            layer = layer.removeprefix(CLIP_MODEL)
        if not layer or layer in adapters.setdefault(component, {}):
            raise ValueError(f"{name} names no layer, or one that is named twice")
        adapters[component][layer] = _factors.weights_of(name, factors)
    return with_settings(adapters, content)


def with_settings(adapters: AdapterWeights, content: FileContent) -> AdapterWeights:
    """The adapters with the alphas of diffusers' metadata, if there is any.

    Args:
        adapters: of a file.
        content: of the same.

    Raises:
        ValueError: the metadata cannot be read, asks for more than is known, or does not go with the tensors.
    """
    settings = settings_of(content.metadata)
    if not settings:
        return adapters
    if any(name.endswith("alpha") for name in content.tensors):
        raise ValueError("it has alphas among its tensors and others in its metadata: which ones are meant?")
    unknown = adapters.keys() - settings.keys()
    if unknown:
        raise ValueError(f"it has tensors for the {min(unknown)}, of which its metadata says nothing")
    return {
        component: {layer: _scaled(component, layer, adapter, settings[component]) for layer, adapter in each.items()}
        for component, each in adapters.items()
    }


def _scaled(component: str, layer: str, adapter: LayerWeights, settings: Settings) -> LayerWeights:
    if adapter.kind != "lora":
        raise ValueError(f"its metadata is that of a LoRA, and {component}.{layer} has a {adapter.kind}")
    if settings.dora and adapter.magnitude is None:
        raise ValueError(f"its metadata has {component}.use_dora, and {component}.{layer} has no magnitudes")
    return replace(adapter, alpha=settings.alpha_of(layer, len(adapter.down)))


def write(weights: AdapterWeights, model: ModelNames | None = None) -> FileContent:
    """See ``Format.write``; the names are the same for all models.

    Raises:
        ValueError: see there.
    """
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for component, adapters in weights.items():
        for layer, adapter in adapters.items():
            name = _named(component, layer)
            if adapter.kind != "lora":
                raise ValueError(
                    f"diffusers' files hold LoRAs and DoRAs alone, and {component}.{name} has a {adapter.kind}"
                )
            tensors[f"{component}.{name}.lora_A.weight"] = adapter.down
            tensors[f"{component}.{name}.lora_B.weight"] = adapter.up
            if adapter.magnitude is not None:
                # PEFT's own name has no "weight", and transformers' loader passes over it
                tensors[f"{component}.{name}.lora_magnitude_vector.weight"] = _lengths(adapter.magnitude, adapter)
        settings |= {f"{component}.{key}": value for key, value in _settings(adapters).items()}
    return FileContent(tensors, {METADATA_KEY: json.dumps(settings, sort_keys=True)})


def _named(component: str, layer: str) -> str:
    return CLIP_MODEL + layer if component.startswith("text_encoder") and layer != "text_projection" else layer


def _lengths(magnitude: Tensor, adapter: LayerWeights) -> Tensor:
    """In PEFT's shape: ``(m,)``, of convolutions ``(1, m, 1, 1)``."""
    return magnitude.reshape(1, -1, *(1 for _ in adapter.down.shape[2:])) if adapter.down.ndim > 2 else magnitude


def _settings(adapters: Mapping[str, LayerWeights]) -> dict[str, Any]:
    """PEFT's settings of a component that say what its tensors do not, or that diffusers' loader looks for."""
    pairs = Counter((len(adapter.down), adapter.alpha) for adapter in adapters.values())
    (rank, alpha), _ = pairs.most_common(1)[0]
    settings: dict[str, Any] = {"r": rank, "lora_alpha": whole(alpha), "target_modules": sorted(adapters)}
    if ranks := patterns({name: len(adapter.down) for name, adapter in adapters.items()}, rank):
        settings["rank_pattern"] = ranks
    if alphas := patterns({name: whole(adapter.alpha) for name, adapter in adapters.items()}, whole(alpha)):
        settings["alpha_pattern"] = alphas
    if any(adapter.magnitude is not None for adapter in adapters.values()):
        settings["use_dora"] = True
    return settings
