"""LoRA files: checked before use, and applied to a stock pipeline as diffusers understands their names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from peft import LoraConfig

from dreamlora.archives import open_tensors
from dreamlora.errors import UserError
from dreamlora.lora.fused import fuse
from dreamlora.lora.metadata import TIMES
from dreamlora.lora.pairs import ADAPTER, put_factors
from dreamlora.lora.settings import Settings, settings_of
from dreamlora.lora.whole import NO_ALPHA, converted, refuse_other_parts, unreadable
from dreamlora.runfolder import LORA_FILE

_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_transformer_")
_RELATIVES = re.compile(r"hada_|lokr_|oft_|\.diff|dora_scale|on_input$")
_FACTOR = re.compile(r"(?P<layer>.+)\.(?P<factor>lora_[AB])\.weight")
_DOWN, _UP = ".lora_A.weight", ".lora_B.weight"
_NAMED = re.compile(r"(?<=lora_[AB])\.default\.")
"""PEFT's name of the adapter, which some leave in."""
_ALWAYS = 2**26
"""Numbers that may be in the LoRA of a model however small."""


@dataclass(frozen=True)
class LoraFile:
    """A LoRA file that was opened and looks right.

    Attributes:
        path: the file itself.
        format: "diffusers" (PEFT's names included) or "kohya".
        shapes: shape of every tensor by key.
        metadata: the file's header.
    """

    path: Path
    format: Literal["diffusers", "kohya"]
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]


def read_lora(path: Path) -> LoraFile:
    """Look into a LoRA: a file, or a folder with ``pytorch_lora_weights.safetensors`` (or one other) in it.

    Only the header is read (and what is no LoRA factor), never a pickle.

    Raises:
        UserError: nothing there, not safetensors, not a LoRA, or more than can be applied (DoRA, LoHa, ...).
    """
    file = _find(Path(path))
    with open_tensors(file) as opened:
        shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118 - no iterator
        metadata = opened.metadata() or {}
        if any(_marks(key) for key in shapes):
            refuse_other_parts(file, shapes, opened.get_tensor)
    kohya = bool(shapes) and all(key.startswith(_KOHYA) for key in shapes)
    if not any(_marks(key) for key in shapes):
        example = next(iter(shapes), "no tensors at all")
        raise UserError(f"{file} is not a LoRA: no lora_A/lora_B or lora_down/lora_up in its names (it has {example})")
    return LoraFile(file, "kohya" if kohya else "diffusers", shapes, metadata)


def same_lora(first: Path, second: Path) -> bool:
    """Whether two files hold the same tensors and metadata but for their dates. Their bytes may differ: safetensors
    shuffles metadata.

    Raises:
        UserError: one of them is no file of tensors.
    """
    with open_tensors(first) as one, open_tensors(second) as other:
        keys = sorted(one.keys())
        return (
            keys == sorted(other.keys())
            and _undated(one.metadata()) == _undated(other.metadata())
            and all(_same(one.get_tensor(key), other.get_tensor(key)) for key in keys)
        )


def _undated(metadata: dict[str, str] | None) -> dict[str, str]:
    return {key: value for key, value in (metadata or {}).items() if key not in TIMES}


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """To the last bit, whatever their type can do."""
    alike = one.shape == other.shape and one.dtype == other.dtype
    return alike and torch.equal(*(tensor.flatten().view(torch.uint8) for tensor in (one, other)))


@dataclass(frozen=True)
class LoraFactors:
    """What a LoRA file puts into a pipeline that it was found to fit, by component.

    Attributes:
        lora: the file.
        parts: its factors, under the names of the layers and PEFT's of the factors.
        alphas: of its layers.
    """

    lora: LoraFile
    parts: dict[str, dict[str, torch.Tensor]]
    alphas: dict[str, dict[str, float]]


def apply_lora(pipeline: Any, path: Path, scale: float = 1.0) -> LoraFile:
    """Put a LoRA into a stock pipeline, with its effect multiplied by ``scale``, as it was while it trained.

    The weights keep their own precision, as float32 (diffusers rounds them to that of the base model), and the layers
    compute in the same order as in training.

    Raises:
        UserError: see :func:`factors_of`.
    """
    factors = factors_of(pipeline, path)
    try:
        for component, tensors in factors.parts.items():
            put_adapter(getattr(pipeline, component), tensors, factors.alphas[component])
    except (ValueError, KeyError, IndexError, RuntimeError) as error:
        pipeline.unload_lora_weights()
        raise unreadable(factors.lora.path, error) from error
    pipeline.set_adapters([ADAPTER], [scale])
    for component in factors.parts:
        fuse(getattr(pipeline, component))
    return factors.lora


def factors_of(pipeline: Any, path: Path) -> LoraFactors:
    """What a LoRA puts into a stock pipeline, whose modules have no adapters yet; nothing is changed.

    diffusers says which layers its names mean. Their ranks are those of the tensors; PEFT is told nothing that stands
    in the file.

    Raises:
        UserError: see :func:`read_lora`; or it was made for another model, or a part of it would not be applied.
    """
    lora = read_lora(path)
    _check_parts(pipeline, lora)
    settings = settings_of(lora.path, lora.metadata)
    with open_tensors(lora.path) as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - no iterator
    state, alphas = converted(pipeline, lora.path, tensors)
    if settings and any(key.endswith("alpha") for key in tensors):
        raise UserError(f"{lora.path} has alphas among its tensors and others in its metadata: which ones are meant?")
    parts, alphas_of = _by_component(pipeline, lora, state), _by_component(pipeline, lora, alphas)
    _check_fit(pipeline, lora, parts)
    return LoraFactors(
        lora,
        parts,
        {
            component: _alphas(lora, component, factors, alphas_of.get(component, {}), settings)
            for component, factors in parts.items()
        },
    )


def _alphas(
    lora: LoraFile,
    component: str,
    factors: Mapping[str, torch.Tensor],
    given: Mapping[str, torch.Tensor],
    settings: Mapping[str, Settings],
) -> dict[str, float]:
    """The alpha of every layer of a component; without any it is the rank.

    Raises:
        UserError: the metadata says something else than the tensors, or nothing of this component; or an alpha is not
            above 0.
    """
    if settings and component not in settings:
        raise UserError(f"{lora.path} has tensors for the {component}, of which its metadata says nothing")
    alphas: dict[str, float] = {}
    for name, down in factors.items():
        layer, is_down, _ = name.partition(_DOWN)
        if not is_down:
            continue
        rank = down.shape[0]
        try:
            alphas[layer] = settings[component].alpha_of(layer, rank) if settings else float(given.get(name, rank))
        except ValueError as error:
            raise UserError(f"{lora.path}: {error}") from None
        if alphas[layer] <= 0:
            raise UserError(NO_ALPHA.format(lora.path, layer, alphas[layer]))
    return alphas


def put_adapter(
    module: Any, factors: Mapping[str, torch.Tensor], alphas: Mapping[str, float], adapter: str = ADAPTER
) -> None:
    """Give layers of a diffusers or transformers model an adapter with these factors, in float32.

    PEFT makes them all of rank 1, as it would find out other ranks by a regular expression for each pair of layers.

    Raises:
        ValueError: PEFT cannot adapt one of them.
    """
    names = "|".join(map(re.escape, alphas))
    module.add_adapter(LoraConfig(r=1, target_modules=f"(?:{names})", init_lora_weights=False), adapter_name=adapter)
    for name, alpha in alphas.items():
        put_factors(module.get_submodule(name), factors[name + _DOWN], factors[name + _UP], alpha, adapter)


def _find(path: Path) -> Path:
    if path.is_dir():
        files = [path / LORA_FILE] if (path / LORA_FILE).is_file() else sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            names = ", ".join(file.name for file in files) or "no *.safetensors"
            raise UserError(f"{path}: expected {LORA_FILE}, found {names}; name the file itself")
        return files[0]
    if not path.is_file():
        raise UserError(f"no such LoRA file or folder: {path}")
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: LoRAs are read as .safetensors only, as pickles can run any code while they load")
    return path


def _marks(key: str) -> bool:
    """Whether a name is one of a LoRA, or of what is trained in its place."""
    return "lora" in key or bool(_RELATIVES.search(key))


def _check_parts(pipeline: Any, lora: LoraFile) -> None:
    """Refuse a second text encoder's LoRA in a pipeline that has one: the loader would not know its names; and more
    numbers than the whole model has, before they are read.
    """
    parts = (getattr(pipeline, name, None) for name in pipeline._lora_loadable_modules)
    size = sum(p.numel() for part in parts if part is not None for p in part.parameters())
    numbers = sum(map(math.prod, lora.shapes.values()))
    if numbers > max(size, _ALWAYS):
        raise UserError(f"{lora.path} holds {numbers:,} numbers, and the model that it is for {size:,}: it is no LoRA")
    second = [key for key in lora.shapes if key.startswith("lora_te2_")]
    if second and getattr(pipeline, "text_encoder_2", None) is None:
        raise UserError(
            f"{lora.path} does not fit this {type(pipeline).__name__}: {len(second)} of its {len(lora.shapes)} "
            f"tensors, such as {second[0]}, are for a text_encoder_2. Was it trained on another model?"
        )


def _by_component(
    pipeline: Any, lora: LoraFile, state: Mapping[str, torch.Tensor]
) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors by component, under the names of its layers and PEFT's of the factors, by the steps of diffusers' loader.

    Raises:
        UserError: it cannot read them, or two names mean the same factor.
    """
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        component, _, name = key.partition(".")
        parts.setdefault(component, {})[name] = value
    for component, tensors in parts.items():
        try:
            named = _peft_names(component, tensors)
        except (ValueError, LookupError, AttributeError) as error:
            raise unreadable(lora.path, error) from error
        flat = not hasattr(getattr(pipeline, component, None), "text_model")
        parts[component] = {
            _NAMED.sub(".", name.removeprefix("text_model.") if flat else name): tensor
            for name, tensor in named.items()
        }
        if len(parts[component]) != len(tensors):
            raise UserError(f"{lora.path} names a factor of the {component} twice")
    return parts


def _peft_names(component: str, tensors: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    if component.startswith("text_encoder"):
        return convert_state_dict_to_peft(convert_state_dict_to_diffusers(dict(tensors)))
    if not any("lora_A" in name for name in tensors):
        return convert_unet_state_dict_to_peft(dict(tensors))
    return tensors


def _check_fit(pipeline: Any, lora: LoraFile, parts: dict[str, dict[str, torch.Tensor]]) -> None:
    """Refuse names and sizes that the pipeline does not have; the loader would skip such names silently."""
    named = {f"{part}.{name}": value for part, tensors in parts.items() for name, value in tensors.items()}
    wrong = [problem for key, value in named.items() if (problem := _problem(pipeline, key, value))]
    wrong = wrong or [problem for key in named if (problem := _problem_of_pair(named, key))]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise UserError(
            f"{lora.path} does not fit this {type(pipeline).__name__}: {wrong[0]}{more}. "
            "Was it trained on another model, or has it other names than diffusers' and kohya's?"
        )


def _problem(pipeline: Any, key: str, value: torch.Tensor) -> str | None:
    component, _, name = key.partition(".")
    module, parts = getattr(pipeline, component, None), _FACTOR.fullmatch(name)
    if component not in pipeline._lora_loadable_modules or not isinstance(module, torch.nn.Module):
        return f"{key} is for a {component!r}, which is not loaded"
    if parts is None:
        return f"{key} is no factor of a LoRA"
    try:
        layer = module.get_submodule(parts["layer"])
    except AttributeError:
        return f"{key} names no layer of the {component}"
    if not isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
        return f"{key} is for a {type(layer).__name__}, and LoRAs are for linear layers and convolutions"
    weight = tuple(layer.weight.shape)
    shape = tuple(value.shape)
    down = (*shape[:1], *weight[1:])
    up = (weight[0], *shape[1:2], *(1 for _ in weight[2:]))
    if shape == (down if parts["factor"] == "lora_A" else up):
        return None
    return f"{key} is {shape}, but the layer's weight is {weight}"


def _problem_of_pair(named: dict[str, torch.Tensor], key: str) -> str | None:
    """LoraFactors come in pairs of one rank; what is missing would be drawn at random."""
    first, second = ("lora_A", "lora_B") if ".lora_A." in key else ("lora_B", "lora_A")
    partner = named.get(key.replace(f".{first}.", f".{second}."))
    if partner is None:
        return f"{key} has no {second} beside it"
    A, B = (named[key], partner) if first == "lora_A" else (partner, named[key])
    return (
        None if A.shape[0] == B.shape[1] else f"{key} has rank {named[key].shape[first == 'lora_B']}, its partner not"
    )
