"""LoRAs, DoRAs, LoHas and LoKrs put into a model through PEFT, as they were read."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, inject_adapter_in_model
from torch import nn

from dreamlora.errors import UserError, is_of_memory
from dreamlora.lora.converter import unreadable
from dreamlora.lora.files import read_weights
from dreamlora.lora.fused import fuse
from dreamlora.lora.names import CLIP_MODEL, ModelNames
from dreamlora.lora.pairs import ADAPTER, device_of, put_factors
from dreamlora.lora.part_names import LOHA, LOKR
from dreamlora.lora.weights import AdapterWeights, LayerWeights
from dreamlora.precision import weight_shape


def apply_lora(pipeline: Any, path: Path, scale: float = 1.0, model: ModelNames | None = None) -> None:
    """Put a LoRA into a stock pipeline, with its effect multiplied by ``scale``, as it was while it trained.

    The weights keep their own precision, as float32 (diffusers rounds them to that of the base model), and the layers
    compute in the same order as in training. Of a DoRA the scale is that of B A, and the magnitudes stay, as in PEFT.

    Raises:
        UserError: see :func:`weights_for`.
    """
    adapters = weights_for(pipeline, path, model)
    try:
        for component, weights in adapters.items():
            put_adapter(getattr(pipeline, component), weights)
    except (ValueError, TypeError, LookupError, RuntimeError) as error:
        pipeline.unload_lora_weights()
        if is_of_memory(error):
            raise
        raise unreadable(path, error) from error
    pipeline.set_adapters([ADAPTER], [scale])
    for component in adapters:
        fuse(getattr(pipeline, component))


def weights_for(pipeline: Any, path: Path, model: ModelNames | None = None) -> AdapterWeights:
    """What a LoRA puts into a stock pipeline, whose modules have no adapters yet, by the names of their layers; nothing
    is changed.

    Args:
        path: see ``files.read_lora``.
        model: names of the pipeline's layers in other programs; None: diffusers reads what is not in its own format.

    Raises:
        UserError: see ``files.read_weights``; or it was made for another model.
    """
    adapters = {
        component: {_in_module(getattr(pipeline, component, None), layer): each for layer, each in weights.items()}
        for component, weights in read_weights(path, model, pipeline).items()
    }
    _check_fit(pipeline, path, adapters)
    return {
        component: {layer: _for_layer(getattr(pipeline, component), layer, each) for layer, each in weights.items()}
        for component, weights in adapters.items()
    }


def put_adapter(module: Any, weights: Mapping[str, LayerWeights], adapter: str = ADAPTER, dropout: float = 0.0) -> None:
    """Give layers of a diffusers or transformers model adapters with these factors, in float32.

    PEFT makes them all of rank 1, as it would find out other ranks by a regular expression for each pair of layers.

    Args:
        module: of the layers.
        weights: by their names; kinds may differ.
        adapter: its name.
        dropout: probability that an input of lora_A is dropped in training.

    Raises:
        ValueError: PEFT cannot adapt one of them.
    """
    by_kind: dict[str, list[str]] = {}
    for layer, each in weights.items():
        by_kind.setdefault(_kind(each), []).append(layer)
    for number, (kind, layers) in enumerate(by_kind.items()):
        config = _KINDS[kind].config(f"(?:{'|'.join(map(re.escape, layers))})", dropout)
        if number == 0:
            module.add_adapter(config, adapter_name=adapter)
            continue
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several kinds are meant
            inject_adapter_in_model(config, module, adapter)
    for layer, each in weights.items():
        _KINDS[_kind(each)].put(module.get_submodule(layer), each, adapter)
    module.to(device_of(module))  # PEFT puts an adapter where its layer waits


def _kind(weights: LayerWeights) -> str:
    return weights.kind if weights.magnitude is None else f"do{weights.kind}"


def _put_lora(layer: Any, weights: LayerWeights, adapter: str) -> None:
    put_factors(layer, weights.down, weights.up, weights.alpha, adapter)


def _put_dora(layer: Any, weights: LayerWeights, adapter: str) -> None:
    _put_lora(layer, weights, adapter)
    vector = layer.lora_magnitude_vector[adapter].weight
    magnitude = weights.magnitude
    assert magnitude is not None
    vector.data = magnitude.to(vector.device, torch.float32).reshape(vector.shape)


def _put_factors_of(names: tuple[str, ...]) -> Callable[[Any, LayerWeights, str], None]:
    def put(layer: Any, weights: LayerWeights, adapter: str) -> None:
        device = layer.base_layer.weight.device
        for name in names:
            parameters = getattr(layer, name)
            if adapter in parameters:
                del parameters[adapter]
            if name in weights.tensors:
                parameters[adapter] = nn.Parameter(weights.tensors[name].to(device, torch.float32))
        rank = weights.rank or 1
        layer.r[adapter], layer.alpha[adapter] = rank, weights.scale * rank

    return put


class _Injection(NamedTuple):
    """How PEFT makes adapters of a kind of layers whose names a pattern fits, and how they get their factors."""

    config: Callable[[str, float], PeftConfig]
    put: Callable[[Any, LayerWeights, str], None]


def _pairs(names: str, dropout: float, dora: bool = False) -> LoraConfig:
    return LoraConfig(r=1, target_modules=names, init_lora_weights=False, lora_dropout=dropout, use_dora=dora)


_KINDS = {
    "lora": _Injection(_pairs, _put_lora),
    "dolora": _Injection(lambda names, dropout: _pairs(names, dropout, dora=True), _put_dora),
    "loha": _Injection(lambda names, _: LoHaConfig(r=1, target_modules=names), _put_factors_of(LOHA)),
    "lokr": _Injection(lambda names, _: LoKrConfig(r=1, target_modules=names), _put_factors_of(LOKR)),
}


def _in_module(module: Any, layer: str) -> str:
    """Name of a layer in a module: transformers may have CLIP's model inside another."""
    return CLIP_MODEL + layer if hasattr(module, "text_model") and layer != "text_projection" else layer


def _for_layer(module: Any, name: str, weights: LayerWeights) -> LayerWeights:
    return weights.with_sides(len(weight_shape(module.get_submodule(name))))


def _check_fit(pipeline: Any, path: Path, adapters: AdapterWeights) -> None:
    """Refuse names and sizes that the pipeline does not have."""
    each = ((name, layer, weights) for name, layers in adapters.items() for layer, weights in layers.items())
    wrong = [problem for place in each if (problem := _problem(pipeline, *place))]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UserError(
            f"{path} does not fit this {type(pipeline).__name__}: {wrong[0]}{more}. Was it trained on another model?"
        )


def _problem(pipeline: Any, component: str, name: str, weights: LayerWeights) -> str | None:
    key, module = f"{component}.{name}", getattr(pipeline, component, None)
    if component not in pipeline._lora_loadable_modules or not isinstance(module, nn.Module):
        return f"{key} is for a {component!r}, which is not loaded"
    try:
        layer = module.get_submodule(name)
    except AttributeError:
        return f"{key} names no layer of the {component}"
    if not isinstance(layer, nn.Linear | nn.Conv2d):
        return f"{key} is a {type(layer).__name__}, and LoRAs are for linear layers and convolutions"
    if weights.magnitude is not None and (weights.kind != "lora" or getattr(layer, "groups", 1) > 1):
        return (
            f"{key} has magnitudes (DoRA) with a {weights.kind}, or for a grouped convolution: PEFT has no such layer"
        )
    weight = tuple(weight_shape(layer))
    return _of_other_size(key, weights, weight)


def _of_other_size(key: str, weights: LayerWeights, weight: tuple[int, ...]) -> str | None:
    if weights.kind == "lora":
        weights = weights.with_sides(len(weight))
        rank = len(weights.down)
        wanted = {"lora_A": (rank, *weight[1:]), "lora_B": (weight[0], rank, *(1 for _ in weight[2:]))}
        found = {name: tuple(weights.tensors[name].shape) for name in wanted}
        wrong = next((name for name in wanted if found[name] != wanted[name]), None)
        return wrong and f"{key}.{wrong}.weight is {found[wrong]}, but the layer's weight is {weight}"
    bare = LayerWeights(weights.kind, {name: tensor.to("meta") for name, tensor in weights.tensors.items()}, 1.0)
    try:
        shape = tuple(bare.delta().shape)
    except RuntimeError:
        return f"the factors of {key} do not go together"
    if shape in (weight, (weight[0], torch.Size(weight[1:]).numel())):
        return None
    return f"the {weights.kind} of {key} is for a weight of {shape}, but the layer's is {weight}"
