"""A LoRA in the format of another program: in its precision, with what its file said of itself, where it belongs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from dreamlora import __version__, registry
from dreamlora.lora.files import LoraFile, read_lora, read_weights
from dreamlora.lora.formats import FileContent, Format, kohya, peft
from dreamlora.lora.metadata import IMPLEMENTATION, carried
from dreamlora.lora.names import ModelNames
from dreamlora.lora.peft_folder import write_peft
from dreamlora.lora.saving import save_content
from dreamlora.lora.weights import AdapterWeights

FORMATS = "lora.formats"
OWN_FORMAT = "diffusers"
"""Of a run's LoRA."""
EXPORTED = "dreamlora.exported"
"""Metadata: from which format to which, and by what."""
_MOST_NAMED = 3

logger = logging.getLogger(__name__)


def converted(path: Path, form: str, model: ModelNames | None = None, dtype: torch.dtype | None = None) -> FileContent:
    """What a LoRA, of whatever program, is in another format, with what its own file says of itself.

    Args:
        path: see ``files.read_lora``.
        form, model, dtype: see ``written``.

    Raises:
        UserError: it cannot be read.
        ValueError: see ``written``.
    """
    lora = read_lora(path)
    content = written(read_weights(path, model), form, model, dtype)
    told = {"from": lora.format, "to": form, "by": f"dreamlora {__version__}"}
    own = _carried(lora) | {EXPORTED: json.dumps(told)}
    if IMPLEMENTATION in own:
        own[IMPLEMENTATION] = _code_with_names_of(form, model)
    return content._replace(metadata=own | content.metadata)


def _code_with_names_of(form: str, model: ModelNames | None) -> str:
    """ModelSpec's word for the code whose names of layers a format has."""
    if is_nameless(form) or model is None or (form == registry.name_of(kohya) and model.kohya == OWN_FORMAT):
        return OWN_FORMAT
    return model.implementation


def _carried(lora: LoraFile) -> dict[str, str]:
    return {name: text for name, text in carried(lora.metadata).items() if not name.endswith(peft.CONFIG)}


def written(
    weights: AdapterWeights, form: str, model: ModelNames | None = None, dtype: torch.dtype | None = None
) -> FileContent:
    """What a file of a format holds.

    Args:
        weights: of a LoRA.
        form: a format.
        model: names of its layers; not needed by a format for which ``is_nameless``.
        dtype: of the factors; None: that of the weights.

    Raises:
        ValueError: the format cannot hold them, or the precision cannot.
    """
    writer: Format = registry.load(FORMATS, form)
    target = dtype or _precision_of(weights)
    wide = torch.float64 if target == torch.float64 else torch.float32  # scales that are multiplied in are not rounded
    precise = {
        component: {layer: adapter.in_precision(wide) for layer, adapter in adapters.items()}
        for component, adapters in weights.items()
    }
    content = writer.write(precise, model)  # type: ignore[arg-type]
    return content._replace(tensors=_rounded(content.tensors, target))


def is_nameless(form: str) -> bool:
    """Whether a format has diffusers' names for whatever model."""
    return form in (OWN_FORMAT, registry.name_of(peft))


def is_folder(form: str) -> bool:
    """Whether it is a folder, and not a file."""
    return form == registry.name_of(peft)


def save(path: Path, form: str, content: FileContent) -> Path:
    """Write what ``written`` has made; what is there is replaced."""
    if is_folder(form):
        write_peft(path, content)
        return path
    return save_content(path, content)


def _precision_of(weights: AdapterWeights) -> torch.dtype:
    """The widest."""
    widest: torch.dtype | None = None
    for adapters in weights.values():
        for adapter in adapters.values():
            for tensor in adapter.tensors.values():
                widest = tensor.dtype if widest is None else torch.promote_types(widest, tensor.dtype)
    return widest or torch.float32


def _rounded(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """In another precision, but for alphas.

    Raises:
        ValueError: a number is larger than any of it.
    """
    result = {name: tensor if name.endswith(".alpha") else tensor.to(dtype) for name, tensor in tensors.items()}
    too_large = [name for name in result if not result[name].isfinite().all()]
    called = str(dtype).removeprefix("torch.")
    if too_large:
        name = too_large[0]
        raise ValueError(
            f"{name} has values up to {tensors[name].abs().max():g}, and {called} none above "
            f"{torch.finfo(dtype).max:g}{_more(len(too_large) - 1)}: give --dtype bf16 or fp32"
        )
    vanished = list(_vanished(tensors, result))
    if vanished:
        logger.warning(
            "%s has no numbers as small as some in %s%s: they are written as 0",
            *(called, ", ".join(vanished[:_MOST_NAMED]), _more(len(vanished) - _MOST_NAMED)),
        )
    return result


def _vanished(before: dict[str, Tensor], after: dict[str, Tensor]) -> Iterator[str]:
    for name, tensor in after.items():
        if tensor.dtype != before[name].dtype and bool(((tensor == 0) & (before[name] != 0)).any()):
            yield name


def _more(count: int) -> str:
    return f" (and {count} more)" if count > 0 else ""
