"""kohya's files (sd-scripts, musubi-tuner; LyCORIS and OneTrainer alike): "lora_unet_" and a name without points.

The denoiser's names are ``ModelNames.kohya``'s. LoKrs of layers that are one there, and LoHas and LoKrs of models that
kohya's programs do not have, are written as LyCORIS writes those of diffusers' models: "lycoris_" and diffusers' names,
which ComfyUI reads too.

Source: kohya's ``networks/lora.py``; LyCORIS' ``wrapper.py`` (LYCORIS_PREFIX); OneTrainer's "lora_transformer_" as in
ComfyUI's ``comfy/lora.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from dreamlora.lora.formats import FileContent, _factors, _placed
from dreamlora.lora.names import CLIP, ModelNames, flat
from dreamlora.lora.weights import AdapterWeights, LayerWeights

_DENOISER = "lora_unet_"
_LYCORIS = "lycoris_"
_DIFFUSERS = ("lora_transformer_", _LYCORIS)
"""Before diffusers' names of the denoiser's layers."""
_TEXT = "lora_te"
_CLIP_MODEL = "text_model_"
_ENDS = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight"}
_TEXT_ENCODERS = {"te": "text_encoder", "te1": "text_encoder", "te2": "text_encoder_2"}
"""Files of models with one text encoder have either of the first two."""


def read(content: FileContent, model: ModelNames) -> AdapterWeights:
    """See ``Format.read``.

    Raises:
        ValueError: see there.
    """
    return _placed.gathered(content, model.denoiser, lambda name: _place(name, model))


def write(weights: AdapterWeights, model: ModelNames) -> FileContent:
    """See ``Format.write``.

    Raises:
        ValueError: see there.
    """
    pairs = any(each.kind == "lora" for layers in weights.values() for each in layers.values())
    if pairs and (lacking := model.lacking("kohya")):
        raise ValueError(lacking)
    named: dict[str, LayerWeights] = {}
    for component, adapters in weights.items():
        of_denoiser = component == model.denoiser
        named |= _denoiser_names(adapters, model) if of_denoiser else _text_names(component, adapters, model)
    if model.one_alpha:
        named = _of_one_alpha(named)
    tensors: dict[str, Tensor] = {}
    for name, adapter in named.items():
        tensors |= {f"{name}.{end}": tensor for end, tensor in _factors.named(adapter, _ENDS)}
        tensors[f"{name}.alpha"] = torch.tensor(adapter.alpha)
    return FileContent(tensors, {})


def _of_one_alpha(named: Mapping[str, LayerWeights]) -> dict[str, LayerWeights]:
    """The same LoRAs with the alpha that most of them have."""
    alphas = Counter(adapter.alpha for adapter in named.values() if adapter.kind == "lora")
    alpha = max(alphas, key=lambda value: (alphas[value], value), default=1.0)
    return {name: adapter.with_alpha(alpha) if adapter.kind == "lora" else adapter for name, adapter in named.items()}


def _denoiser_names(adapters: Mapping[str, LayerWeights], model: ModelNames) -> dict[str, LayerWeights]:
    if model.kohya is None:
        return {_LYCORIS + flat(layer): adapter for layer, adapter in adapters.items()}
    if model.kohya == "diffusers":
        return {_DENOISER + flat(layer): adapter for layer, adapter in adapters.items()}
    apart = {layer: adapter for layer, adapter in adapters.items() if adapter.kind == "lokr"}
    if not any(_is_part(layer, model) for layer in apart):  # if one has to be, all are: diffusers takes no mixture
        apart = {}
    rest = {layer: adapter for layer, adapter in adapters.items() if layer not in apart}
    named = {_DENOISER + flat(name): adapter for name, adapter in _placed.placed(rest, model.layers)}
    return named | {_LYCORIS + flat(layer): adapter for layer, adapter in apart.items()}


def _is_part(layer: str, model: ModelNames) -> bool:
    """Whether a layer is not one there, which a LoKr could not be then."""
    place = model.layers.of_layer(layer)
    return place is not None and (len(place.layers) > 1 or place.original.swapped)


def _text_names(component: str, adapters: Mapping[str, LayerWeights], model: ModelNames) -> dict[str, LayerWeights]:
    if component not in model.text_encoders:
        raise _placed.unnamed(component, model)
    before = f"lora_{model.text_encoders[component]}_"
    return {
        before + ("" if layer == "text_projection" else _CLIP_MODEL) + flat(layer): adapter
        for layer, adapter in adapters.items()
    }


def _place(name: str, model: ModelNames) -> _placed.Place:
    if name.startswith(_TEXT):
        return _text_layer(name, model)
    own = name.startswith(_DENOISER)
    rest = next(name.removeprefix(prefix) for prefix in (_DENOISER, *_DIFFUSERS) if name.startswith(prefix))
    original = model.layers.of_flat_name(rest) if own and model.kohya == "original" else None
    layer = None if original else model.layers.of_flat_layer(rest)
    if original:
        return original
    if layer is None:
        raise ValueError(f"{name} is no layer of the {model.denoiser}")
    return model.denoiser, layer.layers[layer.part]


def _text_layer(name: str, model: ModelNames) -> tuple[str, str]:
    """Component and layer of a text encoder's name."""
    prefix, _, rest = name.removeprefix("lora_").partition("_")
    component = _TEXT_ENCODERS.get(prefix)
    place = CLIP.of_flat_layer(rest.removeprefix(_CLIP_MODEL))
    if component is None or component not in model.text_encoders or place is None:
        raise ValueError(f"{name} is no layer of a text encoder that can have an adapter here")
    return component, place.layers[0]
