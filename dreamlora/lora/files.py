"""LoRA files: checked before use, and applied to a stock pipeline by diffusers' own loader."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from dreamlora.errors import UserError
from dreamlora.lora.fused import fuse
from dreamlora.lora.pairs import ADAPTER
from dreamlora.lora.whole import NO_ALPHA, converted, refuse_other_parts
from dreamlora.runfolder import LORA_FILE

_KOHYA = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lora_transformer_")
_RELATIVES = re.compile(r"hada_|lokr_|oft_|\.diff|dora_scale|on_input$")
_FACTOR = re.compile(r"(?P<layer>.+?)[._](?P<factor>lora_A|lora_B|lora(?:_linear_layer)?[._](?:down|up))\b")
_NAMED = re.compile(r"(?<=lora_[AB])\.default\.")
"""PEFT's name of the adapter, which some leave in."""


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
    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118 - no iterator
            metadata = opened.metadata() or {}
            if any(_marks(key) for key in shapes):
                refuse_other_parts(file, shapes, opened.get_tensor)
    except SafetensorError as error:
        raise UserError(f"{file} is damaged or not a safetensors file: {error}") from error
    kohya = bool(shapes) and all(key.startswith(_KOHYA) for key in shapes)
    if not any(_marks(key) for key in shapes):
        example = next(iter(shapes), "no tensors at all")
        raise UserError(f"{file} is not a LoRA: no lora_A/lora_B or lora_down/lora_up in its names (it has {example})")
    return LoraFile(file, "kohya" if kohya else "diffusers", shapes, metadata)


def same_lora(first: Path, second: Path) -> bool:
    """Whether two files hold the same tensors and metadata. Their bytes may differ: safetensors shuffles metadata."""
    with safe_open(first, framework="pt") as one, safe_open(second, framework="pt") as other:
        keys = sorted(one.keys())
        return (
            keys == sorted(other.keys())
            and one.metadata() == other.metadata()
            and all(torch.equal(one.get_tensor(key), other.get_tensor(key)) for key in keys)
        )


def apply_lora(pipeline: Any, path: Path, scale: float = 1.0) -> LoraFile:
    """Load a LoRA into a stock pipeline, with its effect multiplied by ``scale``, as it was while it trained.

    Its weights keep their own precision, as float32 (diffusers rounds them to that of the base model), and its layers
    compute in the same order as in training.

    Raises:
        UserError: see :func:`read_lora`; or it was made for another model, or a part of it would not be applied.
    """
    lora = read_lora(path)
    _check_parts(pipeline, lora)
    try:
        state, alphas = converted(pipeline, lora.path, load_file(lora.path))
        parts, alphas_of = _by_component(state), _by_component(alphas)
        _check_fit(pipeline, lora, parts)
        _load(pipeline, lora)
        for component, tensors in parts.items():
            _as_written(getattr(pipeline, component), tensors, alphas_of.get(component, {}), lora)
    except (ValueError, KeyError, IndexError, RuntimeError) as error:
        pipeline.unload_lora_weights()
        raise _unreadable(lora, error) from error
    except UserError:
        pipeline.unload_lora_weights()
        raise
    pipeline.set_adapters([ADAPTER], [scale])
    for component in parts:
        fuse(getattr(pipeline, component))
    return lora


def _load(pipeline: Any, lora: LoraFile) -> None:
    try:
        pipeline.load_lora_weights(str(lora.path), adapter_name=ADAPTER, use_safetensors=True)
    except (TypeError, AttributeError) as error:  # of metadata that is none of PEFT's
        raise _unreadable(lora, error) from error


def _unreadable(lora: LoraFile, error: Exception) -> UserError:
    """diffusers names every tensor: a few are enough."""
    why = textwrap.shorten(str(error), 300, placeholder=" …")
    return UserError(f"{lora.path}: diffusers cannot read this {lora.format} file: {why}")


def _as_written(
    module: torch.nn.Module, tensors: dict[str, torch.Tensor], alphas: dict[str, torch.Tensor], lora: LoraFile
) -> None:
    """Give the adapter of ``module`` the values and the alphas of the file again, by PEFT's names, in float32.

    diffusers rounds the values to the precision of the base model. Of alphas that differ from layer to layer it drops
    those of attention and of text encoders, and gives the commonest to layers that have none; they mean the rank.

    Raises:
        UserError: the adapter has what the file has not, or the other way round; or an alpha is not above 0.
    """
    nested = hasattr(module, "text_model")
    values, factors = (
        {name if nested else name.removeprefix("text_model."): tensor for name, tensor in some.items()}
        for some in (tensors, alphas)
    )
    for name, parameter in module.named_parameters():
        if f".{ADAPTER}." in name:
            exact = values.pop(name.replace(f".{ADAPTER}.", "."), None)
            if exact is None:
                raise UserError(f"{lora.path} lacks {name}, which its metadata or its other names ask for")
            parameter.data = exact.detach().to(parameter.device, torch.float32)
    if values:
        raise UserError(f"{lora.path} cannot be applied as a whole: {next(iter(values))} became no part of the model")
    for name, layer in module.named_modules():
        if ADAPTER not in getattr(layer, "lora_alpha", ()):
            continue
        if factors:
            layer.lora_alpha[ADAPTER] = float(factors.get(f"{name}.lora_A.weight", layer.r[ADAPTER]))
        if layer.lora_alpha[ADAPTER] <= 0:
            raise UserError(NO_ALPHA.format(lora.path, name, layer.lora_alpha[ADAPTER]))


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
    """Refuse a second text encoder's LoRA in a pipeline that has one: the loader would not know its names."""
    second = [key for key in lora.shapes if key.startswith("lora_te2_")]
    if second and getattr(pipeline, "text_encoder_2", None) is None:
        raise UserError(
            f"{lora.path} does not fit this {type(pipeline).__name__}: {len(second)} of its {len(lora.shapes)} "
            f"tensors, such as {second[0]}, are for a text_encoder_2. Was it trained on another model?"
        )


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


def _by_component(state: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Tensors under PEFT's names by component, through the steps that the loader takes."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        component, _, name = key.partition(".")
        parts.setdefault(component, {})[name] = value
    for component, tensors in parts.items():
        if component.startswith("text_encoder"):
            parts[component] = convert_state_dict_to_peft(convert_state_dict_to_diffusers(tensors))
        elif not any("lora_A" in name for name in tensors):
            parts[component] = convert_unet_state_dict_to_peft(tensors)
        parts[component] = {_NAMED.sub(".", name): tensor for name, tensor in parts[component].items()}
    return parts


def _problem(pipeline: Any, key: str, value: torch.Tensor) -> str | None:
    component, _, name = key.partition(".")
    module, parts = getattr(pipeline, component, None), _FACTOR.match(name)
    if not isinstance(module, torch.nn.Module):
        return f"{key} is for a {component!r}, which is not loaded"
    if parts is None:
        return f"{key} is no factor of a LoRA"
    layer_name = parts["layer"]
    if not hasattr(module, "text_model"):
        layer_name = layer_name.removeprefix("text_model.")
    try:
        layer = module.get_submodule(layer_name)
    except AttributeError:
        return f"{key} names no layer of the {component}"
    weight = getattr(getattr(layer, "base_layer", layer), "weight", None)
    axis = 1 if parts["factor"].endswith(("A", "down")) else 0
    if weight is None or value.dim() < 2 or value.shape[axis] == weight.shape[axis]:
        return None
    return f"{key} is {tuple(value.shape)}, but the layer's weight is {tuple(weight.shape)}"


def _problem_of_pair(named: dict[str, torch.Tensor], key: str) -> str | None:
    """Factors come in pairs of one rank; what is missing would be drawn at random."""
    first, second = ("lora_A", "lora_B") if ".lora_A." in key else ("lora_B", "lora_A")
    partner = named.get(key.replace(f".{first}.", f".{second}."))
    if partner is None:
        return f"{key} has no {second} beside it"
    A, B = (named[key], partner) if first == "lora_A" else (partner, named[key])
    return (
        None if A.shape[0] == B.shape[1] else f"{key} has rank {named[key].shape[first == 'lora_B']}, its partner not"
    )
