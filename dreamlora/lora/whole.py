"""Whether all that a LoRA file holds is applied: what the loader would leave out is found, and named.

A LoRA without a part of it draws other images, and whoever looks at them takes them for its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamlora.errors import UserError

_FACTOR = re.compile(r"lora(?:\d|_linear_layer)?[._](?:A|B|up|down)(?:\.default)?\.weight$")
_ALPHA = re.compile(r"(?P<layer>.*)[._]alpha$")
_KINDS = {
    r"dora_scale|magnitude_vector": "DoRA's magnitudes",
    r"hada_": "a LoHa (a Hadamard product of two LoRAs)",
    r"lokr_": "a LoKr (a Kronecker product)",
    r"boft|oft_": "an OFT (a rotation of the weights)",
    r"lora_mid": "a Tucker decomposition (LoCon's lora_mid)",
    r"\.(?:diff|diff_b|set_weight)$": "whole weights beside the LoRA",
    r"[wb]_norm$|_norm\.(?:scale|weight)$|\.norm[^.]*\.(?:scale|weight)$": "norm layers",
    r"bias(?:_\w+)?$": "a bias",
    r"\.[abc][12]\.weight$|\.bm\.weight$": "a GLoRA",
    r"on_input$": "an (IA)³",
    r"lora_[AB]\.(?!default\.|weight$)[^.]+\.weight$": "adapters with names of their own",
}
"""What else trainers write, by a pattern of its names."""
NO_ALPHA = "{}: the alpha of {} is {:g}, and must be above 0: programs differ in what they take 0 or less for"


def refuse_other_parts(path: Path, keys: Collection[str], read: Callable[[str], Tensor]) -> None:
    """Nothing, if a file has pairs of factors and their alphas alone, or whatever else it has is zero.

    Args:
        path: for the message.
        keys: names of its tensors.
        read: the tensor of a name.

    Raises:
        UserError: it has something else.
    """
    others = [key for key in keys if not (_FACTOR.search(key) or _ALPHA.match(key))]
    _refuse(path, [key for key in others if bool((read(key) != 0).any())], len(keys))


def converted(pipeline: Any, path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What diffusers' loader makes of a file's tensors: factors in float32, by the names of the pipeline's layers, and
    alphas by the names of the first factors. Alphas that it has multiplied in are not among them.

    Which of them go in is seen from the gradients of what comes out.

    Raises:
        UserError: it leaves some out that are not zero; a factor holds whole numbers, a value is not finite, or an
            alpha not above 0.
        ValueError, KeyError, IndexError, RuntimeError: it cannot read them.
    """
    _refuse_odd_values(path, tensors)
    leaves = {key: value.float().requires_grad_() for key, value in tensors.items() if value.is_floating_point()}
    copies = {key: leaf.clone() for key, leaf in leaves.items()}  # the loader may change them in place
    loaded = type(pipeline).lora_state_dict({**tensors, **copies})
    state, alphas = loaded if isinstance(loaded, tuple) else (loaded, None)
    factors = {key: leaf for key, leaf in leaves.items() if not _ALPHA.match(key)}
    out = [value for value in state.values() if value.requires_grad]
    ones = [torch.ones_like(value) for value in out]
    grads = torch.autograd.grad(out, list(factors.values()), ones, allow_unused=True) if out else [None] * len(factors)
    used = [key for key, grad in zip(factors, grads, strict=True) if grad is not None]
    unused = [key for key in factors if key not in set(used) and bool((factors[key] != 0).any())]
    for key in tensors:
        alpha = _ALPHA.match(key)
        if alpha and not any(factor.startswith(alpha["layer"]) for factor in used):
            unused.append(key)
    _refuse(path, unused, len(tensors))
    return {key: value.detach() for key, value in state.items()}, _by_factor(alphas or {})


def _by_factor(alphas: Mapping[str, Any]) -> dict[str, Tensor]:
    """diffusers names an alpha after its layer, or after its layer's first factor."""
    bare = {key.removesuffix(".alpha"): torch.as_tensor(alpha) for key, alpha in alphas.items()}
    return {key if key.endswith(".weight") else f"{key}.lora.down.weight": alpha for key, alpha in bare.items()}


def _refuse_odd_values(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if _FACTOR.search(key) and not tensor.is_floating_point():
            raise UserError(f"{path}: {key} is of {tensor.dtype}: quantised LoRAs cannot be applied")
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise UserError(f"{path}: {key} is not finite: the LoRA is damaged, or its training diverged")
        if _ALPHA.match(key) and not (tensor > 0).all():  # for some models diffusers would never come to an end
            raise UserError(NO_ALPHA.format(path, key, tensor.min()))


def _refuse(path: Path, unused: Collection[str], total: int) -> None:
    if not unused:
        return
    kinds = {pattern: kind for pattern, kind in _KINDS.items() if any(re.search(pattern, key) for key in unused)}
    example = next(key for key in unused if not kinds or re.search(next(iter(kinds)), key))
    what = " and ".join(kinds.values()) or "something that is not known here, or belongs to no layer of this model"
    raise UserError(
        f"{path} cannot be applied as a whole: {len(unused)} of its {total} tensors, such as {example}, are {what}. "
        "Only pairs of LoRA factors (lora_A and lora_B, lora_down and lora_up) with their alpha are applied; without "
        "the rest the images would not be those of this file"
    )
