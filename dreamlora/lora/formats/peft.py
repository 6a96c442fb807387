"""PEFT's own folders, as ``PeftModel.from_pretrained`` reads them: tensors in one file, their settings in another.

A folder holds the adapter of one component. The denoiser's is the folder itself; those of text encoders lie in it, each
by its component's name. A layer of CLIP's has both names that it has in versions of transformers; PEFT takes the one
that is there. Here all of it is one content: names of tensors and of files have the folder before them
("text_encoder/"), and the files of settings are its metadata.

Source: PEFT's ``utils/save_and_load.py``, ``tuners/lora``, ``tuners/loha`` and ``tuners/lokr``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from dreamlora.lora.formats import FileContent, _factors, _kronecker, _placed
from dreamlora.lora.names import CLIP_MODEL, LayerPlace, ModelNames
from dreamlora.lora.settings import Settings, settings, whole
from dreamlora.lora.weights import AdapterWeights, Kind, LayerWeights
from dreamlora.reading import json_of

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
CONFIG_BYTES = 2**20
_MODEL = "base_model.model."
_TEXT = "text_encoder"
_DENOISERS = ("", "unet/", "transformer/")
"""Folders that may hold the denoiser's; the others are those of PEFT's own example for DreamBooth."""
_ENDS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
_KINDS: dict[str, Kind] = {"LORA": "lora", "LOHA": "loha", "LOKR": "lokr"}
_NO_MATTER = {
    *("init_weights", "rank_dropout", "module_dropout", "rank_dropout_scale", "use_effective_conv2d"),
    *("decompose_both", "decompose_factor"),
}
"""Settings of LoHas and LoKrs that say how they were made or train, or what the shapes of their tensors tell."""


def read(content: FileContent, model: ModelNames) -> AdapterWeights:
    """See ``Format.read``. Without settings, as in files that went alone, scales are 1.

    Raises:
        ValueError: see there; or the settings do not go with the tensors, or ask for more than is known.
    """
    adapters: AdapterWeights = {}
    for folder, tensors in _by_folder(content.tensors).items():
        component = model.denoiser if folder in _DENOISERS else folder.removesuffix("/")
        if component != model.denoiser and component not in model.text_encoders:
            raise ValueError(f"{folder} is the folder of no component that can have an adapter here")
        if component in adapters:
            raise ValueError(f"it has two folders for the {component}")
        adapters[component] = dict(_read(component, tensors, content.metadata.get(folder + CONFIG), model))
    return adapters


def _by_folder(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    folders: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        folder, slash, rest = name.rpartition("/")
        folders.setdefault(folder + slash, {})[rest.removeprefix(_MODEL)] = tensor
    return folders


def _read(
    component: str, tensors: Mapping[str, Tensor], config: str | None, model: ModelNames
) -> Iterator[tuple[str, LayerWeights]]:
    given = None if config is None else _given(component, config)
    places: list[tuple[LayerPlace, LayerWeights]] = []
    for name, factors in _factors.by_layer(tensors).items():
        adapter = _factors.weights_of(name, factors)
        if given is not None:
            adapter = _scaled(component, name, adapter, *given)
        if component != model.denoiser:
            yield name.removeprefix(CLIP_MODEL), adapter
        elif model.layers.of_layer(name):
            yield name, adapter
        elif place := model.layers.of_name(name):
            places.append((place, adapter))
        else:
            raise ValueError(f"{name} is no layer of the {model.denoiser}")
    yield from _placed.unplaced(places)


def _given(component: str, config: str) -> tuple[Kind, Settings]:
    """Kind of the adapters, and their settings. No regular expression in there is run.

    Raises:
        ValueError: it is not what PEFT writes, or asks for more than is known.
    """
    try:
        given = json_of(config)
        if not isinstance(given, dict):
            raise ValueError(f"it is a {type(given).__name__}, and no object")
        kind = _KINDS.get(str(given.pop("peft_type", "LORA")))
        if kind is None:
            raise ValueError(f"it is of no kind of adapter that is known here: {', '.join(_KINDS)}")
        if kind != "lora":
            given = {name: value for name, value in given.items() if name not in _NO_MATTER}
            given["lora_alpha"] = given.pop("alpha", None) or 8
        return kind, settings(component, given)
    except ValueError as error:
        raise ValueError(f"its {CONFIG} is not usable: {error}") from None


def _scaled(component: str, layer: str, adapter: LayerWeights, kind: Kind, given: Settings) -> LayerWeights:
    if adapter.kind != kind:
        raise ValueError(f"its {CONFIG} is of a {kind}, and {component}.{layer} has a {adapter.kind}")
    if given.dora != (adapter.magnitude is not None):
        raise ValueError(f"its {CONFIG} and its tensors do not agree whether {component}.{layer} is a DoRA's")
    if adapter.rank is None:
        return _kronecker.multiplied(adapter, given.scale_of(layer))
    return LayerWeights(kind, adapter.tensors, given.alpha_of(layer, adapter.rank), adapter.magnitude)


def write(weights: AdapterWeights, model: ModelNames | None = None) -> FileContent:
    """See ``Format.write``; the names are the same for all models.

    Raises:
        ValueError: see there.
    """
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for component, adapters in weights.items():
        text = component.startswith(_TEXT)
        folder = f"{component}/" if text else ""
        try:
            metadata[folder + CONFIG] = json.dumps(_config(adapters, text), indent=2, sort_keys=True)
        except ValueError as error:
            raise ValueError(f"PEFT's folders cannot hold the adapter of the {component}: {error}") from None
        for layer, adapter in adapters.items():
            for name in (layer, CLIP_MODEL + layer) if text and layer != "text_projection" else (layer,):
                tensors |= {f"{folder}{_MODEL}{name}.{end}": tensor for end, tensor in _tensors(adapter)}
    return FileContent(tensors, metadata)


def _tensors(adapter: LayerWeights) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in adapter.tensors.items():
        yield _ENDS.get(name, name), tensor
    if adapter.magnitude is not None:
        sides = adapter.down.ndim
        shape = (-1,) if sides == 2 else (1, -1, *(1 for _ in range(sides - 2)))
        yield "lora_magnitude_vector", adapter.magnitude.reshape(shape)


def _config(adapters: Mapping[str, LayerWeights], text: bool) -> dict[str, Any]:
    """Settings with which PEFT makes layers of the same shapes and scales.

    Raises:
        ValueError: there are none.
    """
    kinds = {adapter.kind for adapter in adapters.values()}
    if len(kinds) > 1:
        raise ValueError(f"it is of several kinds, {' and '.join(sorted(kinds))}")
    doras = [name for name, adapter in adapters.items() if adapter.magnitude is not None]
    if doras and (kinds != {"lora"} or len(doras) < len(adapters)):
        raise ValueError(f"{doras[0]} is a DoRA's, and other layers are not")
    kind = kinds.pop()
    ranks = {name: adapter.rank or _kronecker.rank_in_peft(adapter) for name, adapter in adapters.items()}
    alphas = {name: adapter.scale * ranks[name] for name, adapter in adapters.items()}
    (rank, alpha), _ = Counter((ranks[name], alphas[name]) for name in adapters).most_common(1)[0]
    before = "" if text else "^"  # a name can be the end of another one
    config: dict[str, Any] = {
        "peft_type": next(name for name, each in _KINDS.items() if each == kind),
        "base_model_name_or_path": None,
        "task_type": None,
        "inference_mode": True,
        "target_modules": (r"(text_model\.)?" if text else "") + f"({'|'.join(map(re.escape, adapters))})",
        "r": rank,
        "lora_alpha" if kind == "lora" else "alpha": whole(alpha),
        "rank_pattern": {before + name: each for name, each in ranks.items() if each != rank},
        "alpha_pattern": {before + name: whole(each) for name, each in alphas.items() if each != alpha},
    }
    if kind == "lora":
        for name, adapter in adapters.items():
            if adapter.up.ndim > 2 and adapter.up[0, 0].numel() > 1:
                raise ValueError(f"{name} has the sides of its convolution in the second factor")
        return config | {"bias": "none", "use_dora": bool(doras)}
    if kind == "loha":
        return config | {"use_effective_conv2d": any("hada_t1" in each.tensors for each in adapters.values())}
    return config | _kronecker.config_of(adapters, ranks)
