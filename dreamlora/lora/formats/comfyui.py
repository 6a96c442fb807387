"""ComfyUI's own names, as ai-toolkit and others write them: "diffusion_model.", and the original code's name.

Scales are multiplied into the factors, as half of the programs that read such files look for no alpha.

Source: ComfyUI's ``comfy/lora.py`` (``model_lora_keys_unet``: every weight of its model; ``model_lora_keys_clip``:
diffusers' names of CLIP's layers) and ``comfy/weight_adapter``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dreamlora.lora.formats import FileContent, _factors, _placed
from dreamlora.lora.names import CLIP, CLIP_MODEL, ModelNames
from dreamlora.lora.weights import AdapterWeights, LayerWeights

_DENOISER = "diffusion_model."
_CLIPS = {
    f"text_encoders.{clip}.transformer.": component
    for clip, component in (("clip_l", "text_encoder"), ("clip_h", "text_encoder"), ("clip_g", "text_encoder_2"))
}
"""ComfyUI's own names of text encoders, which it writes when it saves or extracts a LoRA."""
_PROJECTIONS = {
    "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.clip_g.transformer.",
}
"""Before the name of a projection, for which it does not know diffusers'."""
_ENDS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}


def read(content: FileContent, model: ModelNames) -> AdapterWeights:
    """See ``Format.read``. Names of diffusers' layers behind "diffusion_model." are taken too, as ComfyUI does.

    Raises:
        ValueError: see there.
    """
    return _placed.gathered(content, model.denoiser, lambda name: _place(name, model))


def _place(name: str, model: ModelNames) -> _placed.Place:
    if not name.startswith(_DENOISER):
        return _text_layer(name, model)
    rest = name.removeprefix(_DENOISER)
    place = model.layers.of_name(rest)
    if place:
        return place
    if model.layers.of_layer(rest):
        return model.denoiser, rest
    raise ValueError(f"{name} is no layer of the {model.denoiser}")


def write(weights: AdapterWeights, model: ModelNames) -> FileContent:
    """See ``Format.write``.

    Raises:
        ValueError: see there.
    """
    if lacking := model.lacking("comfyui"):
        raise ValueError(lacking)
    tensors: dict[str, Tensor] = {}
    for component, adapters in weights.items():
        for name, adapter in _named(component, adapters, model):
            if adapter.kind == "lora":
                adapter = adapter.with_alpha(float(len(adapter.down)))
            else:
                tensors[f"{name}.alpha"] = torch.tensor(adapter.alpha)
            tensors |= {f"{name}.{end}": tensor for end, tensor in _factors.named(adapter, _ENDS)}
    return FileContent(tensors, {})


def _named(
    component: str, adapters: Mapping[str, LayerWeights], model: ModelNames
) -> Iterator[tuple[str, LayerWeights]]:
    if component == model.denoiser:
        yield from ((_DENOISER + name, adapter) for name, adapter in _placed.placed(adapters, model.layers))
        return
    if component not in model.text_encoders:
        raise _placed.unnamed(component, model)
    for layer, adapter in adapters.items():
        before = _PROJECTIONS[component] if layer == "text_projection" else f"{component}.{CLIP_MODEL}"
        yield before + layer, adapter


def _text_layer(name: str, model: ModelNames) -> tuple[str, str]:
    """Component and layer of a text encoder's name, ComfyUI's or diffusers'."""
    component, _, layer = name.partition(".")
    for clip, component_there in _CLIPS.items():
        if name.startswith(clip):
            component, layer = component_there, name.removeprefix(clip)
    layer = layer.removeprefix(CLIP_MODEL)
    if component not in model.text_encoders or CLIP.of_layer(layer) is None:
        raise ValueError(f"{name} is no layer of a text encoder that can have an adapter here")
    return component, layer
