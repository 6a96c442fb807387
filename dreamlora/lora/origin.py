"""Which model a LoRA is for, in words: for messages of what does not fit."""

from __future__ import annotations

from typing import Any

from dreamlora import registry
from dreamlora.lora.formats import FileContent
from dreamlora.lora.names import ModelNames
from dreamlora.lora.weights import AdapterWeights
from dreamlora.reading import shortened

_SAYS_MODEL = ("modelspec.architecture", "ss_base_model_version")
"""Entries of headers that name the model."""


def made_for(content: FileContent, name: str) -> str:
    """A sentence, or nothing if nothing is known.

    Args:
        content: of the file.
        name: of its format.
    """
    families = families_of(content, name)
    header = next((content.metadata[key] for key in _SAYS_MODEL if content.metadata.get(key)), "")
    words = [f"by its layers it is for {' or '.join(families)}"] if families else []
    words += [f"its header says {shortened(header)}"] if header else []
    return f" ({' and '.join(words)})" if words else ""


def families_of(content: FileContent, name: str) -> list[str]:
    """Those that have all layers of a file; where some would call them as the file does, these.

    Args:
        content: of the file.
        name: of its format; empty: it is of none.
    """
    form: Any = registry.load("lora.formats", name) if name else None
    found: dict[str, bool] = {}
    for family in registry.names("families.layers") if form else ():
        model = registry.load("families.layers", family).names({})
        try:
            weights = form.read(content, model)
            if _has_all(model, weights):
                found[family] = _names(form.write(weights, model)) >= _names(content)
        except ValueError:
            continue
    return [family for family, same in found.items() if same] or list(found)


def _names(content: FileContent) -> set[str]:
    return {name for name in content.tensors if not name.endswith(".alpha")}


def _has_all(model: ModelNames, adapters: AdapterWeights) -> bool:
    return model.denoiser in adapters and all(map(model.layers.of_layer, adapters[model.denoiser]))
