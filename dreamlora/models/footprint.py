"""How much memory a computation takes, found by going through it with tensors without numbers (torch's meta device).

The code that is measured is the model's own: each of its operations says how large its result is, and results are
counted for as long as something holds them, among them what autograd keeps for the backward pass. Nothing is computed,
so it takes a second for a model of any size, and no GPU. Autocast, which torch does not have there, is done by hand as
CUDA's is: products in half precision, norms in float32. What it does not know: workspaces of kernels, fragmentation and
the CUDA context. So the peak is that of ``torch.cuda.max_memory_allocated``.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from dreamlora.precision import autocast_on_meta, packable, quantized_bytes, unpacking_bytes

META = torch.device("meta")
_IN_HALF = ("linear", "conv1d", "conv2d", "conv3d", "conv_transpose2d")
_IN_FULL = ("layer_norm", "group_norm", "rms_norm", "softmax")
"""Functions of torch.nn.functional that CUDA's autocast computes in half precision, and in float32."""


class Footprint:
    """A context in which meta tensors are counted, and what decides shapes stays real.

    Masks, token ids and positions decide how much is computed, so tensors that have numbers keep them, on the CPU, also
    where the code moves them to the meta device, and may be mixed with meta tensors; so do whole numbers that are made
    there.

    Args:
        modules: whose weights are there already and do not count.
        autocast: its precision; float32, None: it is off.

    Attributes:
        peak: bytes of all that was held at the worst moment.
    """

    def __init__(self, modules: Iterable[nn.Module], autocast: torch.dtype | None = None) -> None:
        self._counting = _Counting(tensor for module in modules for tensor in _tensors_of(module))
        self._autocast = None if autocast == torch.float32 else autocast
        self._stack = ExitStack()

    @property
    def peak(self) -> int:
        """Bytes of all that was held at the worst moment."""
        return self._counting.peak

    def __enter__(self) -> Footprint:
        self._stack.enter_context(_replaced({"scaled_dot_product_attention": _fused_attention}))
        if self._autocast:
            self._stack.enter_context(autocast_on_meta(self._autocast))
            half = dict.fromkeys((*_IN_HALF, "scaled_dot_product_attention"), _casting(self._autocast))
            self._stack.enter_context(_replaced({**half, **dict.fromkeys(_IN_FULL, _casting(torch.float32))}))
        self._stack.enter_context(self._counting)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()


def _tensors_of(module: nn.Module) -> Iterable[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


class _Counting(TorchDispatchMode):
    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = self._held = 0
        self._known: dict[int, weakref.ref[Any]] = {}
        for tensor in known:
            self._count(tensor, own=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            self._count(tensor)
        made = kwargs.get("device") == META or func.overloadpacket.__name__.startswith("new_")
        if made and _keeps_numbers(func, args, kwargs):
            kwargs["device"] = torch.device("cpu")
        if func is torch.ops.aten._to_copy.default and args[0].is_meta:
            kwargs["device"] = META  # what has no numbers cannot go where the others are
        if 0 < sum(tensor.is_meta for tensor in tensors) < len(tensors):
            if func is torch.ops.aten.index.Tensor or func is torch.ops.aten.index_put_.default:
                args = (args[0], _places(args[1]), *args[2:])
            args, kwargs = tree_map_only(Tensor, _without_numbers, (args, kwargs))
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor, *, own: bool = True) -> None:
        if not tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if own else 0
        if key in self._known:
            return
        self._known[key] = weakref.ref(storage)
        weakref.finalize(storage, self._forget, key, size).atexit = False
        self._held += size
        self.peak = max(self.peak, self._held)

    def _forget(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self._held -= size


def _keeps_numbers(func: Any, args: Any, kwargs: Mapping[str, Any]) -> bool:
    if func is torch.ops.aten._to_copy.default:
        return not args[0].is_meta
    kind = kwargs.get("dtype")
    if kind is not None:
        return not (kind.is_floating_point or kind.is_complex)
    name = func.overloadpacket.__name__
    numbers = args[1:] if name == "full" else args
    return name in ("arange", "full") and all(isinstance(number, int) for number in numbers)


def _places(indices: Any) -> list[Any]:
    """Masks as the places where they are true: of a mask without numbers nobody knows how many these are."""
    places: list[Any] = []
    for index in indices:
        if isinstance(index, Tensor) and index.dtype == torch.bool and not index.is_meta:
            places += index.nonzero(as_tuple=True)
        else:
            places.append(index)
    return places


def _without_numbers(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_meta else torch.empty_like(tensor, device=META)


Function = Callable[..., Tensor]


@contextmanager
def _replaced(replacements: Mapping[str, Callable[[Function], Function]]) -> Iterator[None]:
    """Functions of torch.nn.functional are others in here, each made of the one that was there.

    In their place: a mode for functions is off while a checkpoint computes again in the backward pass.
    """
    originals = {name: getattr(F, name) for name in replacements}
    for name, replacement in replacements.items():
        setattr(F, name, replacement(originals[name]))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(F, name, original)


def _fused_attention(original: Function) -> Function:
    """Attention without the matrix of all tokens by all tokens, as GPUs compute it; meta tensors would have one."""

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not query.is_meta:
            return original(query, key, value, *args, **kwargs)
        result: Tensor = _Attention.apply(query, key, value)
        return result

    return attention


def _casting(dtype: torch.dtype) -> Callable[[Function], Function]:
    """What autocast does to a function: tensors without numbers get there in this precision."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_meta and tensor.is_floating_point() else tensor

    def replacement(original: Function) -> Function:
        def function(*args: Any, **kwargs: Any) -> Tensor:
            args, kwargs = tree_map_only(Tensor, cast, (args, kwargs))
            return original(*args, **kwargs)

        return function

    return replacement


class _Attention(torch.autograd.Function):
    """Keeps queries, keys, values, the result and a number for each query, and gives no numbers."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, result, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.empty_like, ctx.saved_tensors[:3]))


@dataclass(frozen=True)
class Stored:
    """What the weights of a module take, however its layers are stored (``precision``).

    Attributes:
        rest: bytes of all that stays as it is.
        layers: that can be stored in fewer bits.
    """

    rest: int
    layers: tuple[nn.Linear, ...]

    @classmethod
    def of(cls, module: nn.Module, inside: bool = False) -> Stored:
        """Of a frozen model without a LoRA, or of a block that is ``inside`` one."""
        layers = tuple(layer for _, layer in packable(nn.ModuleDict({"0": module}) if inside else module))
        return cls(bytes_of(_tensors_of(module)) - bytes_of(layer.weight for layer in layers), layers)

    def bytes(self, word: str | None) -> int:
        """In a form of ``precision.FORMS``; None: as they are."""
        if word is None:
            return self.rest + bytes_of(layer.weight for layer in self.layers)
        return self.rest + sum(quantized_bytes(layer, word) for layer in self.layers)

    def unpacking(self, word: str | None, dtype: torch.dtype) -> int:
        """Of the largest layer while it computes."""
        return max((unpacking_bytes(layer, word, dtype) for layer in self.layers), default=0) if word else 0


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """What tensors hold, with or without numbers."""
    return sum(math.prod(tensor.shape) * tensor.element_size() for tensor in tensors)
