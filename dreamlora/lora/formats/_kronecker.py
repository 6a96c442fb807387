"""LoKrs as PEFT makes them: the sizes of both matrices follow from settings that are those of all layers.

Source: PEFT's ``tuners/lokr/layer.py`` (``LoKrLayer.update_layer``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peft.tuners.lokr.layer import factorization

from dreamlora.lora.weights import LayerWeights

_FIRST, _SECOND = "lokr_w1", "lokr_w2"
_AREAS = (1, 9, 25, 49)
"""Of kernels."""


def multiplied(adapter: LayerWeights, scale: float) -> LayerWeights:
    """The same LoKr of two whole matrices, which has no alpha, with a scale in the first."""
    first = adapter.tensors[_FIRST] * scale
    return replace(adapter, tensors={**adapter.tensors, _FIRST: first})


def rank_in_peft(adapter: LayerWeights) -> int:
    """The least with which PEFT leaves both matrices whole."""
    return -(-max(side for matrix in (_FIRST, _SECOND) for side in _shape(adapter, matrix)) // 2)


def config_of(adapters: Mapping[str, LayerWeights], ranks: Mapping[str, int]) -> dict[str, Any]:
    """The settings with which PEFT makes these layers.

    Args:
        adapters: LoKrs by layer.
        ranks: that PEFT is told.

    Raises:
        ValueError: there are none for all of them.
    """
    both = any(f"{_FIRST}_a" in adapter.tensors for adapter in adapters.values())
    wrong = ""
    for factor in (-1, *sorted({side for adapter in adapters.values() for side in _shape(adapter, _FIRST)})):
        made = {name: _is_made(adapter, ranks[name], factor, both) for name, adapter in adapters.items()}
        wrong = next((name for name, fits in made.items() if not fits), "")
        if not wrong:
            cores = any("lokr_t2" in adapter.tensors for adapter in adapters.values())
            return {"decompose_both": both, "decompose_factor": factor, "use_effective_conv2d": cores}
    raise ValueError(f"whatever its decompose_factor, PEFT would make a LoKr of other sizes for {wrong}")


def _is_made(adapter: LayerWeights, rank: int, factor: int, both: bool) -> bool:
    """Whether PEFT makes factors of these shapes."""
    first = _shape(adapter, _FIRST)
    for area in _AREAS if _is_flat(adapter) else (1,):
        rows, columns = _shape(adapter, _SECOND)
        second = (rows, columns // area)
        sizes = all(
            factorization(outer * inner, factor) == (outer, inner) for outer, inner in zip(first, second, strict=True)
        )
        parted = (both and rank < max(first) / 2, rank < max(second) / 2)
        if sizes and columns % area == 0 and parted == tuple(f"{m}_a" in adapter.tensors for m in (_FIRST, _SECOND)):
            return True
    return False


def _is_flat(adapter: LayerWeights) -> bool:
    """Whether the columns of its second matrix may be those of a convolution, times the area of its kernel."""
    return f"{_SECOND}_b" in adapter.tensors and "lokr_t2" not in adapter.tensors


def _shape(adapter: LayerWeights, matrix: str) -> tuple[int, int]:
    """Of a matrix, whole or not, without the sides of a kernel."""
    tensors = adapter.tensors
    if matrix in tensors:
        rows, columns = tensors[matrix].shape[:2]
        return rows, columns
    rows = tensors[f"{matrix}_a"].shape["lokr_t2" in tensors and matrix == _SECOND]
    return rows, tensors[f"{matrix}_b"].shape[1]
