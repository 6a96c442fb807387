"""Frozen weights in fewer bits: which form stands behind each word of ``--base_precision``, and on which devices.

Only the storage is small. A layer computes as ever, in the precision of the run, with weights that are unpacked when
they are used, forwards and again backwards, and let go. LoRA and optimizer know nothing of it.

fp8 and int8 are stored as torchao's weight-only configs store them (symmetric, one float32 scale per row), in a few
lines of torch that need no package; the tests hold them against the steps of each row. nf4 is bitsandbytes'
(blocks of 64, their scales in 8 bits), by its functions. The quantization configs that diffusers and transformers have
for the same formats are not used: they refuse bitsandbytes without a GPU, load each in a way of its own, and torchao's
layers keep every unpacked weight until the backward pass.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamlora.config.model import check_package
from dreamlora.errors import UserError

Packed = dict[str, Tensor]
"""A weight in fewer bits: tensors by name."""


@dataclass(frozen=True)
class WeightForm:
    """How a weight ``(m, n)`` is stored.

    Attributes:
        pack: the weight to tensors, on its device.
        unpack: these tensors to a weight of a shape and dtype.
        bytes: of the tensors of a weight ``(m, n)``.
        devices: types that compute it; others are refused.
    """

    pack: Callable[[Tensor], Packed]
    unpack: Callable[[Mapping[str, Tensor], torch.Size, torch.dtype], Tensor]
    bytes: Callable[[int, int], int]
    devices: frozenset[str]


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight is stored in fewer bits, and computes in the precision of its input.

    PEFT, inits and whoever else reads ``weight`` find the unpacked weight there, made anew at each look.

    Args:
        layer: that it takes the place of; on the device where it is packed.
        word: of ``FORMS``.
    """

    def __init__(self, layer: nn.Linear, word: str) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.precision = word
        self.dtype = layer.weight.dtype
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)
        self._form = FORMS[word]
        for name, tensor in self._form.pack(layer.weight.detach()).items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def shape(self) -> torch.Size:
        """``(m, n)`` of the weight."""
        return torch.Size((self.out_features, self.in_features))

    def dense(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
        """The weight ``(m, n)``, as close as what is stored comes to it; unpacked on the device, by default its own."""
        packed: Any = self._buffers
        if device is not None:
            packed = {name: tensor.to(device) for name, tensor in packed.items()}
        return self._form.unpack(packed, self.shape, dtype or self.dtype)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """``dense()``."""
        return self.dense()

    def forward(self, input: Tensor) -> Tensor:
        """``x Wᵀ + b`` of x ``(..., n)``."""
        x = input.to(computing_dtype(input))
        result: Tensor = _FrozenProduct.apply(x, self) if not torch.compiler.is_compiling() else product(x, self)
        return result

    def extra_repr(self) -> str:
        """As a Linear's, with the precision."""
        return f"{super().extra_repr()}, precision={self.precision}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """With a weight that has a shape and no numbers: diffusers looks sizes up there when it loads a LoRA."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = torch.empty(self.shape, dtype=self.dtype, device="meta")

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves, and never turns into another type: what is stored is no number of the model's."""
        kept = {name: tensor.dtype for name, tensor in self._buffers.items() if tensor is not None}
        super()._apply(fn, recurse)
        for name, dtype in kept.items():
            if self._buffers[name].dtype != dtype:  # type: ignore[union-attr]
                raise TypeError(f"a layer in {self.precision} cannot be turned into another type")
        return self


def computing_dtype(x: Tensor) -> torch.dtype:
    """What a linear layer computes in with this input: what autocast says, else the input's own."""
    return autocast_dtype(x) or x.dtype


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast computes in with this input; None: it is off."""
    if x.is_meta:
        return _AUTOCAST_ON_META.get()
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


@contextmanager
def autocast_on_meta(dtype: torch.dtype | None) -> Iterator[None]:
    """In here layers take tensors without numbers for such that autocast is on for; torch has none for these."""
    token = _AUTOCAST_ON_META.set(dtype)
    try:
        yield
    finally:
        _AUTOCAST_ON_META.reset(token)


_AUTOCAST_ON_META: ContextVar[torch.dtype | None] = ContextVar("autocast_on_meta", default=None)


def dense_weight(layer: nn.Module, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Tensor:
    """The weight of a layer in a precision, however and wherever it is stored.

    Args:
        layer: with a ``weight``.
        dtype, device: None: the layer's own.
    """
    if isinstance(layer, QuantizedLinear):
        return layer.dense(dtype, device)
    weight: Any = layer.weight
    dense: Tensor = weight.to(device, dtype)
    return dense


def weight_shape(layer: Any) -> torch.Size:
    """Of a linear layer or convolution, however it is stored: looking at ``weight`` may unpack it."""
    shape: torch.Size = layer.shape if isinstance(layer, QuantizedLinear) else layer.weight.shape
    return shape


def product(x: Tensor, layer: nn.Linear) -> Tensor:
    """``x Wᵀ + b`` in the precision of x."""
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    if torch.compiler.is_compiling() and isinstance(layer, QuantizedLinear):
        packed: Any = layer._buffers
        shape = [layer.out_features, layer.in_features]
        y = _packed_product(x, list(packed.values()), " ".join(packed), layer.precision, shape, True)
        return y if bias is None else y + bias
    return F.linear(x, dense_weight(layer, x.dtype), bias)


class _FrozenProduct(torch.autograd.Function):
    """``x Wᵀ + b``; backwards W is unpacked once more, where autograd would keep it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.layer = layer
        return product(x, layer)

    @staticmethod
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor, None]:
        return gy @ dense_weight(ctx.layer, gy.dtype), None


@torch.library.custom_op(
    "dreamlora::packed_product",
    mutates_args=(),
    # which newer versions of torch alone find out by themselves
    schema="(Tensor x, Tensor[] packed, str names, str word, SymInt[] shape, bool transposed) -> Tensor",
)
def _packed_product(
    x: Tensor, packed: Sequence[Tensor], names: str, word: str, shape: Sequence[int], transposed: bool
) -> Tensor:
    """``x Wᵀ``, or ``x W``, of a stored weight W: for torch.compile, which would keep what it sees unpacked."""
    tensors = dict(zip(names.split(), packed, strict=True))
    weight = FORMS[word].unpack(tensors, torch.Size(shape), x.dtype)
    return x @ (weight.mT if transposed else weight)


@_packed_product.register_fake
def _(x: Tensor, packed: Sequence[Tensor], names: str, word: str, shape: Sequence[int], transposed: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[0 if transposed else 1])


def _keep_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, *ctx.how = inputs
    ctx.save_for_backward(*packed)


def _packed_product_backward(ctx: Any, gy: Tensor) -> tuple[Any, ...]:
    packed, (*how, transposed) = list(ctx.saved_tensors), ctx.how
    return _packed_product(gy, packed, *how, not transposed), [None] * len(packed), None, None, None, None


_packed_product.register_autograd(_packed_product_backward, setup_context=_keep_packed)


def quantize(module: nn.Module, word: str, device: torch.device, waiting: Iterable[nn.Module] = ()) -> None:
    """Store a frozen model's linear layers in fewer bits, one after the other, each on the device.

    Args:
        module: of diffusers or transformers; what is not in its blocks (embedders, the last projection) stays as it is.
        word: of ``FORMS``.
        device: where layers are packed, and stay.
        waiting: submodules whose layers go back to host memory, each before the next one is packed.
    """
    elsewhere = {id(layer) for part in waiting for layer in part.modules()}
    for name, layer in list(packable(module)):
        if word == "bf16" and layer.weight.dtype == torch.bfloat16:
            continue
        parent, _, last = name.rpartition(".")
        packed = QuantizedLinear(layer.to(device), word).train(layer.training)
        setattr(module.get_submodule(parent), last, packed.to("cpu") if id(layer) in elsewhere else packed)


def packable(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Linear layers of a model that are stored in fewer bits: those in its blocks, by name."""
    for name, layer in module.named_modules():
        if type(layer) is nn.Linear and re.search(r"(^|\.)\d+\.", name):
            yield name, layer


def quantized_bytes(layer: nn.Linear, word: str) -> int:
    """Of a layer's weight as it would be stored."""
    return FORMS[word].bytes(layer.out_features, layer.in_features)


def unpacking_bytes(layer: nn.Linear, word: str, dtype: torch.dtype) -> int:
    """Of what is made while a layer computes in ``dtype``: its weight, and in fp8 its numbers before scaling."""
    if word == "bf16" and dtype == torch.bfloat16:
        return 0
    copies = 2 if word == "fp8" else 1
    return copies * layer.out_features * layer.in_features * dtype.itemsize


def require(flag: str, word: str | None, device: str) -> None:
    """Nothing, if weights can be stored so.

    Args:
        flag: that asks, for messages.
        word: of ``FORMS``; None: as they are.
        device: type, such as cuda.

    Raises:
        UserError: no such form; a package is missing; or the device does not compute it.
    """
    if word is None:
        return
    if word not in FORMS:
        raise UserError(f"--{flag} {word}: there are {', '.join(FORMS)}")
    form = FORMS[word]
    if device not in form.devices:
        others = [other for other, one in FORMS.items() if device in one.devices]
        raise UserError(f"--{flag} {word} cannot be computed on {device}: give {' or '.join(others)}")
    check_package(flag, word)


def is_available(word: str, device: str) -> bool:
    """Whether weights can be stored so: what ``require`` asks."""
    try:
        require("base_precision", word, device)
    except UserError:
        return False
    return True


def _rows(highest: float, dtype: torch.dtype) -> tuple[Callable[[Tensor], Packed], Any]:
    """Pack and unpack with one scale per row, whose largest number becomes ``highest``."""
    floor = torch.finfo(torch.float32).eps

    def pack(weight: Tensor) -> Packed:
        rows = weight.float()
        scale = (rows.abs().amax(1, keepdim=True) / highest).clamp(min=floor)
        numbers = rows / scale
        numbers = numbers.clamp(-highest, highest) if dtype.is_floating_point else numbers.round()
        return {"numbers": numbers.to(dtype), "scale": scale}

    def unpack(packed: Mapping[str, Tensor], shape: torch.Size, wanted: torch.dtype) -> Tensor:
        numbers = packed["numbers"]
        if dtype.is_floating_point:
            numbers = numbers.to(wanted)  # exact; torch multiplies no float8
        # one pass, in float32, with nothing but the result in memory
        return torch.mul(numbers, packed["scale"], out=numbers.new_empty(shape, dtype=wanted))

    return pack, unpack


def _pack_nf4(weight: Tensor) -> Packed:
    numbers, state = _bitsandbytes().quantize_4bit(
        weight.contiguous(), blocksize=_BLOCK, compress_statistics=True, quant_type="nf4"
    )
    nested = state.state2
    return {
        "numbers": numbers,
        "scale": state.absmax,
        "code": state.code,
        "offset": state.offset,
        "nested_scale": nested.absmax,
        "nested_code": nested.code,
    }


def _unpack_nf4(packed: Mapping[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    library = _bitsandbytes()
    nested = library.QuantState(
        packed["nested_scale"], code=packed["nested_code"], blocksize=_NESTED_BLOCK, dtype=torch.float32
    )
    state = library.QuantState(
        packed["scale"], shape, packed["code"], _BLOCK, "nf4", dtype, offset=packed["offset"], state2=nested
    )
    dense: Tensor = library.dequantize_4bit(packed["numbers"], state)
    return dense


def _bitsandbytes() -> Any:
    """Its functions."""
    return importlib.import_module("bitsandbytes.functional")


def _nf4_bytes(m: int, n: int) -> int:
    blocks = -(-m * n // _BLOCK)
    return -(-m * n // 2) + blocks + 4 * -(-blocks // _NESTED_BLOCK) + 4 * (16 + 256 + 1)


_BLOCK, _NESTED_BLOCK = 64, 256
"""Of bitsandbytes: weights that share a scale, and scales that share one."""
_ALL = frozenset({"cuda", "cpu", "xpu", "mps", "meta"})

FORMS: dict[str, WeightForm] = {
    "bf16": WeightForm(
        lambda weight: {"numbers": weight.bfloat16()},
        lambda packed, shape, dtype: packed["numbers"].to(dtype),
        lambda m, n: 2 * m * n,
        _ALL,
    ),
    "fp8": WeightForm(*_rows(448.0, torch.float8_e4m3fn), bytes=lambda m, n: m * n + 4 * m, devices=_ALL - {"mps"}),
    "int8": WeightForm(*_rows(127.0, torch.int8), bytes=lambda m, n: m * n + 4 * m, devices=_ALL),
    "nf4": WeightForm(_pack_nf4, _unpack_nf4, _nf4_bytes, _ALL - {"mps", "meta"}),
}
"""By the words of ``--base_precision`` and ``--text_encoder_precision``."""
