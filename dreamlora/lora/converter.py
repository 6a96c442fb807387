"""LoRA files that no format here knows (xlabs', BFL's, those of old versions): as diffusers' own loader reads them.

Its converters leave out what they do not expect. Which tensors go in is seen from the gradients of what comes out.
"""

from __future__ import annotations

import bisect
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import (
    convert_state_dict_to_diffusers,
    convert_state_dict_to_peft,
    convert_unet_state_dict_to_peft,
)
from torch import Tensor

from dreamlora.errors import UserError
from dreamlora.lora.formats import _factors
from dreamlora.lora.names import CLIP_MODEL
from dreamlora.lora.weights import AdapterWeights
from dreamlora.lora.whole import ALPHA, refuse

_FIRST = ".lora_A.weight"


def read_through_diffusers(pipeline: Any, path: Path, tensors: Mapping[str, Tensor]) -> AdapterWeights:
    """The LoRAs that diffusers' loader finds in a file's tensors, in float32.

    Args:
        pipeline: whose class knows the names.
        path: for messages.
        tensors: factors and alphas.

    Raises:
        UserError: it cannot read them, or leaves some out that are not zero; or they do not belong together.
    """
    state, alphas = _converted(pipeline, path, tensors)
    parts, alphas_of = _by_component(path, state), _by_component(path, alphas)
    adapters: AdapterWeights = {}
    try:
        for component, factors in parts.items():
            given = {name.removesuffix(_FIRST): alpha for name, alpha in alphas_of.get(component, {}).items()}
            for layer, pair in _factors.by_layer(factors).items():
                more = {"alpha": given[layer]} if layer in given else {}
                adapters.setdefault(component, {})[layer] = _factors.weights_of(
                    f"{component}.{layer}", {**pair, **more}
                )
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return adapters


def _converted(pipeline: Any, path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Factors by the names of the pipeline's layers, and alphas by the names of the first factors. Alphas that were
    multiplied in are not among them.
    """
    leaves = {key: value.float().requires_grad_() for key, value in tensors.items() if value.is_floating_point()}
    copies = {key: leaf.clone() for key, leaf in leaves.items()}  # the loader may change them in place
    try:
        loaded = type(pipeline).lora_state_dict({**tensors, **copies}, return_alphas=True)
    except Exception as error:  # its converters say all kinds of things of names and shapes that they do not expect
        raise unreadable(path, error) from error
    state, alphas = loaded if isinstance(loaded, tuple) else (loaded, None)
    factors = {key: leaf for key, leaf in leaves.items() if not ALPHA.match(key)}
    out = [value for value in state.values() if value.requires_grad]
    ones = [torch.ones_like(value) for value in out]
    grads = torch.autograd.grad(out, list(factors.values()), ones, allow_unused=True) if out else [None] * len(factors)
    used = sorted(key for key, grad in zip(factors, grads, strict=True) if grad is not None)
    unused = [key for key in factors if key not in set(used) and bool((factors[key] != 0).any())]
    for key in tensors:
        alpha = ALPHA.match(key)
        if alpha and not _is_beginning(alpha["layer"], used):
            unused.append(key)
    refuse(path, unused, len(tensors))
    return {key: value.detach() for key, value in state.items()}, _by_factor(alphas or {}, state)


def unreadable(path: Path, error: Exception) -> UserError:
    """diffusers names every tensor: a few are enough."""
    why = textwrap.shorten(str(error) or type(error).__name__, 300, placeholder=" …")
    return UserError(f"{path}: diffusers cannot read this file: {why}")


def _by_factor(alphas: Mapping[str, Any], state: Collection[str]) -> dict[str, Tensor]:
    """diffusers names an alpha after its layer, or after its layer's first factor."""
    named: dict[str, Tensor] = {}
    for key, alpha in alphas.items():
        bare = key.removesuffix(".alpha")
        of_peft = f"{bare}{_FIRST}"
        name = bare if bare.endswith(".weight") else of_peft if of_peft in state else f"{bare}.lora.down.weight"
        named[name] = torch.as_tensor(alpha).detach()
    return named


def _is_beginning(text: str, names: Sequence[str]) -> bool:
    """Whether one of the names, which are sorted, begins with the text."""
    place = bisect.bisect_left(names, text)
    return place < len(names) and names[place].startswith(text)


def _by_component(path: Path, state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by component, under the names of its layers and PEFT's of the factors, by the steps of diffusers' loader.

    Raises:
        UserError: it cannot read them, or two names mean the same factor.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        component, _, name = key.partition(".")
        parts.setdefault(component, {})[name] = value
    for component, tensors in parts.items():
        try:
            named = _peft_names(component, tensors)
        except (ValueError, LookupError, AttributeError) as error:
            raise unreadable(path, error) from error
        parts[component] = {name.removeprefix(CLIP_MODEL): tensor for name, tensor in named.items()}
        if len(parts[component]) != len(tensors):
            raise UserError(f"{path} names a factor of the {component} twice")
    return parts


def _peft_names(component: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    if component.startswith("text_encoder"):
        return convert_state_dict_to_peft(convert_state_dict_to_diffusers(dict(tensors)))
    if not any("lora_A" in name for name in tensors):
        return convert_unet_state_dict_to_peft(dict(tensors))
    return tensors
