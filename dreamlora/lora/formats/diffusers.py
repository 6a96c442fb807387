"""diffusers' files, as ``save_lora_weights`` writes them: "unet." and PEFT's names; alphas are in the metadata."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from dreamlora.lora.formats import FileContent
from dreamlora.lora.names import ModelNames
from dreamlora.lora.settings import METADATA_KEY
from dreamlora.lora.targets import patterns
from dreamlora.lora.weights import AdapterWeights, LayerWeights

_ENDS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
CLIP_MODEL = "text_model."
"""Before the layers of a CLIP text encoder. transformers 5 has it no more, but files do: diffusers takes both."""


def recognises(names: Collection[str]) -> bool:
    """See ``Format.recognises``."""
    return bool(names) and all(
        name.startswith(("unet.", "transformer.", "text_encoder.", "text_encoder_")) for name in names
    )


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
    settings: dict[str, Any] = {"r": rank, "lora_alpha": _whole(alpha), "target_modules": sorted(adapters)}
    if ranks := patterns({name: len(adapter.down) for name, adapter in adapters.items()}, rank):
        settings["rank_pattern"] = ranks
    if alphas := patterns({name: _whole(adapter.alpha) for name, adapter in adapters.items()}, _whole(alpha)):
        settings["alpha_pattern"] = alphas
    if any(adapter.magnitude is not None for adapter in adapters.values()):
        settings["use_dora"] = True
    return settings


def _whole(alpha: float) -> float | int:
    return int(alpha) if alpha == int(alpha) else alpha
