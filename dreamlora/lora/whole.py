"""Whether all that a LoRA file holds can be applied: what cannot is found, and named.

A LoRA without a part of it draws other images, and whoever looks at them takes them for its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dreamlora.errors import UserError
from dreamlora.lora.formats import _factors
from dreamlora.lora.settings import HIGHEST_ALPHA

PAIR = re.compile(r"lora(?:\d|_linear_layer)?[._](?:A|B|up|down)(?:\.default)?\.weight$")
ALPHA = re.compile(r"(?P<layer>.*)[._]alpha$")
"""Names of a pair's factors and of alphas, in old files too."""
MARKS = re.compile(r"lora|lycoris_|hada_|lokr_|oft_|\.diff(?:_b)?$|dora_scale|on_input$")
"""In names of what is trained in the place of a model's weights."""
_KINDS = {
    r"dora_scale|magnitude_vector": "DoRA's magnitudes of a kind that is not known",
    r"hada_": "a LoHa of a kind that is not known",
    r"lokr_": "a LoKr of a kind that is not known",
    r"^bundle_emb\.": "embeddings of new words (bundle_emb)",
    r"boft|oft_": "an OFT (a rotation of the weights)",
    r"\.(?:diff|diff_b|set_weight)$": "whole weights beside the LoRA",
    r"[wb]_norm$|_norm\.(?:scale|weight)$|\.norm[^.]*\.(?:scale|weight)$": "norm layers",
    r"bias(?:_\w+)?$": "a bias",
    r"\.[abc][12]\.weight$|\.bm\.weight$": "a GLoRA",
    r"on_input$": "an (IA)³",
    r"lambda_layer$|\.[pq]_layer\.weight$": "a T-LoRA",
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
    """Nothing, if a file has parts of adapters alone, or whatever else it has is zero.

    Args:
        path: for the message.
        shapes: of its tensors by name.
        read: the tensor of a name.

    Raises:
        UserError: it has something else.
    """
    others = [key for key in shapes if not is_part(key)]
    few = sum(math.prod(shapes[key]) for key in others) <= _MOST_ZEROS
    if not (few and all(_is_zero(read(key)) for key in others)):
        refuse(path, others, len(shapes))


def is_part(name: str) -> bool:
    """Whether a name is that of a part of an adapter, of whatever format."""
    return _factors.is_part(name) or bool(PAIR.search(name) or ALPHA.match(name))


def _is_zero(tensor: Tensor) -> bool:
    try:
        return not bool(tensor.count_nonzero())
    except RuntimeError:  # of types that torch can only store
        return False


def refuse_odd_values(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Nothing, if all numbers are such that they can be computed with.

    Raises:
        UserError: a factor holds whole numbers or nothing, a value is not finite, or an alpha is out of bounds.
    """
    for key, tensor in tensors.items():
        if ALPHA.match(key):
            _refuse_odd_alpha(path, key, tensor)
        elif is_part(key) and tensor.dtype not in _PRECISIONS:
            raise UserError(f"{path}: {key} is of {tensor.dtype}: quantised LoRAs cannot be applied")
        elif is_part(key) and not tensor.numel():
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
        raise UserError(NO_ALPHA.format(path, key.removesuffix(".alpha"), alpha))


def refuse(path: Path, unused: Collection[str], total: int) -> None:
    """Nothing, if there is nothing that is not applied.

    Args:
        unused: names of what is not.
        total: how many tensors the file has.

    Raises:
        UserError: there is something; the message says what it is.
    """
    if not unused:
        return
    kinds = {pattern: kind for pattern, kind in _KINDS.items() if any(re.search(pattern, key) for key in unused)}
    example = next(key for key in unused if not kinds or re.search(next(iter(kinds)), key))
    what = " and ".join(kinds.values()) or "something that is not known here, or belongs to no layer of this model"
    raise UserError(
        f"{path} cannot be applied as a whole: {len(unused)} of its {total} tensors, such as {example}, are {what}. "
        "Only LoRAs, DoRAs, LoHas and LoKrs with their alphas are applied; without the rest the images would not be "
        "those of this file"
    )
