"""Where the weights of a model's layers are stored: in the files of a folder, or in a single file by other names.

Layers are named as in diffusers' and transformers' models, without the "text_model." of CLIP, as ``lora.weights`` has
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dreamlora.archives import open_tensors
from dreamlora.errors import UserError
from dreamlora.lora.names import CLIP_MODEL, LayerNames, LayerPlace, Original
from dreamlora.models.single_file.kinds import ClipEncoder
from dreamlora.models.weights import MOST_TENSORS
from dreamlora.reading import shortened

_NUMBERS = ("F64", "F32", "F16", "BF16")
_WEIGHT = ".weight"


@dataclass(frozen=True)
class TensorHeader:
    """Of a tensor in a file: its type as safetensors has it ("BF16"), and its shape."""

    kind: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class LayerWeight:
    """Where the weight of a layer is.

    Attributes:
        file, tensor: of which it is the whole, or some rows.
        shape: of the layer's weight.
        first: of these rows.
        swapped: the halves of the rows have changed places.
        transposed: the tensor is the other way round.
    """

    file: Path
    tensor: str
    shape: tuple[int, ...]
    first: int = 0
    swapped: bool = False
    transposed: bool = False

    def of(self, whole: Tensor) -> Tensor:
        """The layer's weight in the tensor."""
        own = (whole.mT if self.transposed else whole)[self.first : self.first + self.shape[0]]
        return _exchanged(own) if self.swapped else own

    def put(self, whole: Tensor, weight: Tensor) -> None:
        """Change the tensor in place."""
        own = (whole.mT if self.transposed else whole)[self.first : self.first + self.shape[0]]
        own.copy_(_exchanged(weight) if self.swapped else weight)


def _exchanged(rows: Tensor) -> Tensor:
    return torch.cat(rows.chunk(2)[::-1])


Layers = dict[str, LayerWeight]
"""By name."""


def headers_of(file: Path) -> dict[str, TensorHeader]:
    """Of all tensors of a file.

    Raises:
        UserError: see ``archives.open_tensors``.
    """
    with open_tensors(file, most=MOST_TENSORS) as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - no iterator
        return {name: TensorHeader(one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}


def refuse_quantised(file: Path, headers: Mapping[str, TensorHeader], names: Iterable[str]) -> None:
    """Nothing, if these tensors are of ordinary numbers.

    Raises:
        UserError: one is not: what is added to it would be lost in its rounding, or needs scales that stand elsewhere.
    """
    for name in names:
        if headers[name].kind not in _NUMBERS:
            raise UserError(
                f"{file}: {shortened(name)[1:-1]} is of type {headers[name].kind}: quantised weights have no room for "
                "what a LoRA changes. Give the model that it was made from, in float16, bfloat16 or float32"
            )


def layers_of_folder(files: Iterable[Path]) -> Layers:
    """Of a component saved by diffusers or transformers: whatever has a weight of two or more sides.

    Raises:
        UserError: see ``headers_of``.
    """
    return {
        name.removesuffix(_WEIGHT).removeprefix(CLIP_MODEL): LayerWeight(file, name, header.shape)
        for file in files
        for name, header in headers_of(file).items()
        if name.endswith(_WEIGHT) and len(header.shape) > 1
    }


def layers_of_denoiser(file: Path, headers: Mapping[str, TensorHeader], prefix: str, names: LayerNames) -> Layers:
    """Of a denoiser in the original code's names.

    Args:
        file, headers: that hold it.
        prefix: of its tensors.
        names: of its layers.

    Raises:
        UserError: a tensor does not have the rows of the layers that it is made of.
    """
    layers: Layers = {}
    for tensor, header in headers.items():
        if tensor.startswith(prefix) and tensor.endswith(_WEIGHT) and len(header.shape) > 1:
            place = names.of_name(tensor.removeprefix(prefix).removesuffix(_WEIGHT))
            if place:
                layers |= _parts(file, tensor, header.shape, place)
    return layers


def layers_of_clip(file: Path, headers: Mapping[str, TensorHeader], encoder: ClipEncoder) -> Layers:
    """Of a text encoder in a single file; raises as ``layers_of_denoiser``."""
    layers: Layers = {}
    for tensor, header in headers.items():
        if not tensor.startswith(encoder.prefix) or len(header.shape) != 2:
            continue
        name = tensor.removeprefix(encoder.prefix)
        if encoder.layout == "clip":
            if name.endswith(_WEIGHT):
                layer = name.removesuffix(_WEIGHT).removeprefix(CLIP_MODEL)
                layers[layer] = LayerWeight(file, tensor, header.shape)
        elif name == "text_projection":
            layers[name] = LayerWeight(file, tensor, header.shape[::-1], transposed=True)
        elif place := _OPEN_CLIP.of_name(name):
            layers |= _parts(file, tensor, header.shape, place)
    return layers


_OPEN_CLIP = LayerNames(
    Original(f"transformer.resblocks.{{}}.{name}", tuple(f"encoder.layers.{{}}.{layer}" for layer in layers))
    for name, layers in {
        "attn.in_proj_weight": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "attn.out_proj.weight": ("self_attn.out_proj",),
        "mlp.c_fc.weight": ("mlp.fc1",),
        "mlp.c_proj.weight": ("mlp.fc2",),
    }.items()
)
"""Tensors of OpenCLIP's text encoders."""


def _parts(file: Path, tensor: str, shape: tuple[int, ...], place: LayerPlace) -> Layers:
    try:
        rows = place.original.rows_of(shape[0])
    except ValueError as error:
        raise UserError(f"{file}: {shortened(tensor)[1:-1]} is of another model: {error}") from None
    return {
        layer: LayerWeight(file, tensor, (count, *shape[1:]), sum(rows[:part]), place.original.swapped)
        for part, (layer, count) in enumerate(zip(place.layers, rows, strict=True))
    }
