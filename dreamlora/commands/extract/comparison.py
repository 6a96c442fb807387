"""Two models of one architecture, compared tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from tqdm import tqdm

from dreamlora.archives import open_tensors
from dreamlora.commands.base_model import BaseModel
from dreamlora.commands.kept_layers import KeptLayers
from dreamlora.errors import UserError
from dreamlora.lora.low_rank import Cut, Kept, kept, spectrum_of_matrix
from dreamlora.lora.names import CLIP, CLIP_MODEL
from dreamlora.models.checkpoint import LayerWeight
from dreamlora.models.weights import MOST_TENSORS

Read: TypeAlias = Callable[[Path, str], Tensor]
"""A tensor of a file."""


@dataclass
class Differences:
    """What differs.

    Attributes:
        layers: as LoRAs.
        equal: how many layers do not differ.
        others: what differs and no LoRA can hold: names, and how much of it.
    """

    layers: KeptLayers = field(default_factory=KeptLayers)
    equal: int = 0
    others: list[dict[str, Any]] = field(default_factory=list)


def compare(base: BaseModel, tuned: BaseModel, cut: Cut, read: Read) -> Differences:
    """What the tuned model has changed.

    Args:
        base, tuned: with layers of the same shapes.
        cut: how much of each layer's change is kept.
        read: of ``opened_tensors``.

    Raises:
        UserError: a weight is not finite.
    """
    found = Differences()
    places = list(_shared(base, tuned))
    for component, layer, own, its in tqdm(places, "extracting", unit="layer", delay=3, leave=False):
        before, after = (place.of(read(place.file, place.tensor)) for place in (own, its))
        name = f"{component}.{layer}"
        if _equal(before, after):
            found.equal += 1
        elif _can_hold(base, component, layer, own.shape):
            change = _change(name, before, after)
            low = _low_rank(change, cut)
            found.layers.add(component, layer, low, float(change.norm()))
        else:
            found.others.append(_difference(f"{name}.weight", before, after))
    found.others += _other_differences(base, tuned, read)
    return found


@contextmanager
def opened_tensors() -> Iterator[Read]:
    """Files that are opened once each."""
    with ExitStack() as stack:
        files: dict[Path, Any] = {}

        def read(file: Path, name: str) -> Tensor:
            if file not in files:
                files[file] = stack.enter_context(open_tensors(file, most=MOST_TENSORS))
            tensor: Tensor = files[file].get_tensor(name)
            return tensor

        yield read


def _shared(base: BaseModel, tuned: BaseModel) -> Iterator[tuple[str, str, LayerWeight, LayerWeight]]:
    for component, layers in base.layers.items():
        for layer, place in layers.items():
            its = tuned.layers.get(component, {}).get(layer)
            if its is not None:
                yield component, layer, place, its


def _equal(before: Tensor, after: Tensor) -> bool:
    """Also where the one is the other in a lower precision."""
    if before.dtype != after.dtype and before.is_floating_point() and after.is_floating_point():
        lower = min((before.dtype, after.dtype), key=lambda dtype: torch.finfo(dtype).bits)
        before, after = before.to(lower), after.to(lower)
    return torch.equal(before, after)


def _can_hold(base: BaseModel, component: str, layer: str, shape: tuple[int, ...]) -> bool:
    """Whether a LoRA's file can: embeddings and convolutions of single channels have none, nor have text encoders
    whose LoRA no pipeline loads.
    """
    if component in base.names.text_encoders:
        return CLIP.of_layer(layer) is not None
    if component != base.names.denoiser or len(shape) not in (2, 4):
        return False
    named = base.names.layers.of_layer(layer) is not None
    return (named or not layer.endswith("embedding")) and not (len(shape) == 4 and shape[1] == 1)


def _change(name: str, before: Tensor, after: Tensor) -> Tensor:
    change = after.double() - before.double()
    if not bool(change.isfinite().all()):
        raise UserError(f"{name} is not finite in one of the models: it is damaged, or its training diverged")
    return change


def _low_rank(change: Tensor, cut: Cut) -> Kept:
    low = kept(spectrum_of_matrix(change.flatten(1), cut), cut, tuple(change.shape))
    return low._replace(weights=low.weights.in_precision(torch.float32))


def _difference(name: str, before: Tensor, after: Tensor) -> dict[str, Any]:
    size = (after.double() - before.double()).norm() / before.double().norm().clamp_min(1e-30)
    return {"tensor": name, "numbers": before.numel(), "relative_change": float(size)}


def _other_differences(base: BaseModel, tuned: BaseModel, read: Read) -> Iterator[dict[str, Any]]:
    """Of tensors that are no layer's weight; of a folder and a file, whose names differ, none are compared."""
    if bool(base.pipeline) != bool(tuned.pipeline):
        return
    of_base, of_tuned = _others(base), _others(tuned)
    for name, (file, tensor) in of_base.items():
        if name not in of_tuned:
            continue
        before, after = read(file, tensor), read(*of_tuned[name])
        if before.shape == after.shape and before.is_floating_point() and not _equal(before, after):
            yield _difference(name, before, after)


def _others(model: BaseModel) -> dict[str, tuple[Path, str]]:
    """Where tensors are that are no layer's weight, by their names and components."""
    weights = {(place.file, place.tensor) for layers in model.layers.values() for place in layers.values()}
    return {
        f"{component}.{tensor.removeprefix(CLIP_MODEL)}": (file, tensor)
        for component, files in model.files.items()
        for file, headers in files.items()
        for tensor in headers
        if (file, tensor) not in weights
    }
