"""Whether all that a LoRA file holds is applied: what the loader would leave out is found, and named.

A LoRA without a part of it draws other images, and whoever looks at them takes them for its own.
"""

from __future__ import annotations

import bisect
import math
import re
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamlora.errors import UserError
from dreamlora.lora.settings import HIGHEST_ALPHA

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
_MOST_ZEROS = 2**26
"""Numbers in what is no factor that are looked at; whole layers of zeros are rare."""
_PRECISIONS = {
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
}
_WHOLE = {torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64}
NO_ALPHA = "{}: the alpha of {} is {:g}, and must be above 0: programs differ in what they take 0 or less for"


def refuse_other_parts(path: Path, shapes: Mapping[str, Sequence[int]], read: Callable[[str], Tensor]) -> None:
    """Nothing, if a file has pairs of factors and their alphas alone, or whatever else it has is zero.

    Args:
        path: for the message.
        shapes: of its tensors by name.
        read: the tensor of a name.

    Raises:
        UserError: it has something else.
    """
    others = [key for key in shapes if not (_FACTOR.search(key) or _ALPHA.match(key))]
    few = sum(math.prod(shapes[key]) for key in others) <= _MOST_ZEROS
    _refuse(path, [key for key in others if not (few and _is_zero(read(key)))], len(shapes))


def _is_zero(tensor: Tensor) -> bool:
    try:
        return not bool(tensor.count_nonzero())
    except RuntimeError:  # of types that torch can only store
        return False


def converted(pipeline: Any, path: Path, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What diffusers' loader makes of a file's tensors: factors in float32, by the names of the pipeline's layers, and
    alphas by the names of the first factors. Alphas that it has multiplied in are not among them.

    Which of them go in is seen from the gradients of what comes out.

    Raises:
        UserError: it cannot read them; it leaves some out that are not zero; a factor holds whole numbers or nothing, a
            value is not finite, or an alpha is out of bounds.
    """
    _refuse_odd_values(path, tensors)
    leaves = {key: value.float().requires_grad_() for key, value in tensors.items() if value.is_floating_point()}
    copies = {key: leaf.clone() for key, leaf in leaves.items()}  # the loader may change them in place
    try:
        loaded = type(pipeline).lora_state_dict({**tensors, **copies}, return_alphas=True)
    except Exception as error:  # its converters say all kinds of things of names and shapes that they do not expect
        raise unreadable(path, error) from error
    state, alphas = loaded if isinstance(loaded, tuple) else (loaded, None)
    factors = {key: leaf for key, leaf in leaves.items() if not _ALPHA.match(key)}
    out = [value for value in state.values() if value.requires_grad]
    ones = [torch.ones_like(value) for value in out]
    grads = torch.autograd.grad(out, list(factors.values()), ones, allow_unused=True) if out else [None] * len(factors)
    used = sorted(key for key, grad in zip(factors, grads, strict=True) if grad is not None)
    unused = [key for key in factors if key not in set(used) and bool((factors[key] != 0).any())]
    for key in tensors:
        alpha = _ALPHA.match(key)
        if alpha and not _is_beginning(alpha["layer"], used):
            unused.append(key)
    _refuse(path, unused, len(tensors))
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
        of_peft = f"{bare}.lora_A.weight"
        name = bare if bare.endswith(".weight") else of_peft if of_peft in state else f"{bare}.lora.down.weight"
        named[name] = torch.as_tensor(alpha).detach()
    return named


def _is_beginning(text: str, names: Sequence[str]) -> bool:
    """Whether one of the names, which are sorted, begins with the text."""
    place = bisect.bisect_left(names, text)
    return place < len(names) and names[place].startswith(text)


def _refuse_odd_values(path: Path, tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if _ALPHA.match(key):
            _refuse_odd_alpha(path, key, tensor)
        elif _FACTOR.search(key) and tensor.dtype not in _PRECISIONS:
            raise UserError(f"{path}: {key} is of {tensor.dtype}: quantised LoRAs cannot be applied")
        elif _FACTOR.search(key) and not tensor.numel():
            raise UserError(f"{path}: {key} is {tuple(tensor.shape)}: there is nothing in it")
        elif tensor.dtype in _PRECISIONS and not tensor.float().isfinite().all():
            raise UserError(f"{path}: {key} is not finite: the LoRA is damaged, or its training diverged")


def _refuse_odd_alpha(path: Path, key: str, tensor: Tensor) -> None:
    if tensor.numel() != 1 or tensor.is_complex() or not (tensor.is_floating_point() or tensor.dtype in _WHOLE):
        raise UserError(f"{path}: {key} is {tuple(tensor.shape)} of {tensor.dtype}, and an alpha is one number")
    alpha = float(tensor)
    if not math.isfinite(alpha) or alpha > HIGHEST_ALPHA:
        raise UserError(f"{path}: {key} is {alpha:g}, and an alpha is finite and at most {HIGHEST_ALPHA:g}")
    if alpha <= 0:  # for some models diffusers would never come to an end
        raise UserError(NO_ALPHA.format(path, key, alpha))


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
