"""The adapters in a file, layer by layer: ranks, alphas, precision, size, and what is wrong with them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dreamlora.commands.inspect.measures import DeltaSize, Measure
from dreamlora.commands.inspect.tensors import Array, TensorFile
from dreamlora.lora.file_layers import FileLayer
from dreamlora.lora.settings import METADATA_KEY, Settings, settings_of

_PEFT_ALPHA = 8
"""Of LoHas and LoKrs whose settings name none."""
_CORES = ("lora_mid", "hada_t1", "lokr_t2")


@dataclass(frozen=True)
class LayerFacts:
    """What is found of one layer's adapter.

    Attributes:
        layer: of the file.
        kind: "lora", "dora", "loha", "lokr", or one of these with " of a Tucker decomposition".
        rank: None of a LoKr of two whole matrices.
        alpha: that scales it by ``alpha / rank``; None: of no account, or not to be told.
        size: of ΔW; None: not computed.
        finite: whether all of its numbers are.
        zero: whether ΔW is nothing but zeros.
    """

    layer: FileLayer
    kind: str
    rank: int | None
    alpha: float | None
    size: DeltaSize | None
    finite: bool
    zero: bool


class Alphas:
    """Where a file says what its adapters are scaled by: in tensors, in diffusers' metadata, or in PEFT's settings.

    Args:
        file: that is open.
        peft: settings that lie beside it.
    """

    def __init__(self, file: TensorFile, peft: Mapping[str, Any] | None) -> None:
        self._file = file
        self._settings: Mapping[str, Settings] = {}
        self._fixed: float | None = None
        self.problems: list[str] = []
        metadata = dict(file.metadata)
        if peft is not None and peft.get("peft_type", "LORA") != "LORA":
            alpha = peft.get("alpha")
            self._fixed = float(alpha) if isinstance(alpha, int | float) else float(_PEFT_ALPHA)
            return
        if peft is not None:
            metadata[METADATA_KEY] = json.dumps({f".{name}": value for name, value in peft.items()})
        try:
            self._settings = settings_of(metadata)
        except ValueError as error:
            self.problems.append(str(error))

    def of(self, layer: FileLayer, rank: int | None) -> float | None:
        """A layer's; its rank where nothing is said, None where what is said cannot be."""
        if "alpha" in layer.parts:
            return self._stored(layer.parts["alpha"])
        if rank is None:
            return None
        if self._fixed is not None:
            return self._fixed
        settings = self._of_component(layer)
        if settings is None:
            return float(rank)
        try:
            return settings.alpha_of(layer.layer, rank)
        except ValueError as error:
            self.problems.append(str(error))
            return None

    def _of_component(self, layer: FileLayer) -> Settings | None:
        names = (layer.component,) if layer.component else ("unet", "transformer", "")
        return next((self._settings[name] for name in names if name in self._settings), None)

    def _stored(self, name: str) -> float | None:
        value = self._file.numbers(name) if math.prod(self._file.shapes[name]) == 1 else None
        alpha = math.nan if value is None else float(value.reshape(()))
        if not math.isfinite(alpha) or alpha <= 0:
            self.problems.append(f"{name} is no number above 0")
            return None
        return alpha


def facts_of(file: TensorFile, layers: Sequence[FileLayer], alphas: Alphas) -> Iterator[LayerFacts]:
    """What is found of each layer; reads all of its tensors.

    Args:
        file: that is open.
        layers: with an adapter.
        alphas: of the file.
    """
    measure = Measure()
    for layer in layers:
        rank = _rank(file, layer)
        alpha = alphas.of(layer, rank)
        names = {part: name for part, name in layer.parts.items() if part != "alpha"}
        values = {part: file.numbers(name) for part, name in names.items()}
        known = {part: array for part, array in values.items() if array is not None}
        finite = all(bool(np.isfinite(array).all()) for array in known.values())
        factors = {part: array for part, array in known.items() if part != "magnitude"}
        size = None
        if finite and len(known) == len(names) and rank != 0:
            size = measure.size_of(factors, 1.0 if not rank else math.nan if alpha is None else alpha / rank)
        yield LayerFacts(layer, _kind(layer), rank, alpha if rank else None, size, finite, _is_zero(factors, size))


def _is_zero(factors: Mapping[str, Array], size: DeltaSize | None) -> bool:
    """Whether ΔW is: some factor is, whatever else."""
    return size.norm == 0 if size else any(array.size > 0 and not array.any() for array in factors.values())


def _kind(layer: FileLayer) -> str:
    kind: str = "dora" if layer.kind == "lora" and "magnitude" in layer.parts else layer.kind
    if "magnitude" in layer.parts and kind != "dora":
        kind = f"{kind} with magnitudes"
    return f"{kind} of a Tucker decomposition" if any(core in layer.parts for core in _CORES) else kind


def _rank(file: TensorFile, layer: FileLayer) -> int | None:
    for part in ("lora_A", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
        if part in layer.parts:
            shape = file.shapes[layer.parts[part]]
            return shape[0] if shape else 0
    return None
