"""A device that lacks what Apple's GPUs lack: ``FakeMps()`` is its tensors' home, ``moved`` brings a module there.

Its tensors say ``device(type="mps")``, so that code which asks for the device takes the branch it takes there, and hold
a CPU tensor, which does the arithmetic. What raises is what raises on a Mac, with the same words:

* float64 on the device, and a copy from the device that becomes float64 on its way (the cast is made before the copy);
* Cholesky, QR and eigenvalue decompositions, which some or all versions of torch that are allowed do not have there;
* arithmetic between the device and the CPU.
"""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

MPS = torch.device("mps", 0)
FLOAT64 = "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
MISSING = ("_linalg_eigh", "linalg_eig", "linalg_qr", "geqrf", "linalg_cholesky_ex", "linalg_householder_product")
COPIES = ("_to_copy", "copy_", "_foreach_copy_")
INDEXED = ("index", "index_put_")  # indices may lie on the CPU


class MpsTensor(Tensor):
    """``inner`` on the CPU, under another name; to C++ it is on "meta", where nothing could be computed by mistake."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> MpsTensor:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made: MpsTensor = Tensor._make_wrapper_subclass(cls, inner.shape, device="meta", **layout)
        made.inner = inner
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return MPS

    @property
    def is_mps(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"MpsTensor({self.inner})"

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (Tensor.data_ptr, Tensor.tolist):
            return function(args[0].inner)
        if function == Tensor.data.__set__:  # type: ignore[attr-defined]
            args[0].inner = args[1].inner
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class FakeMps(TorchDispatchMode):
    """While it is on, tensors can be made on the device and moved to it."""

    def __enter__(self) -> Self:
        self._names = _Names()
        self._names.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._names.__exit__(*error)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class _Names(TorchFunctionMode):
    """Sees what Python calls: torch does things before it asks a dispatch mode, and cannot do them without hardware."""

    meta_is_meant = False

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tuple(map(_numbered, args)), {key: _numbered(value) for key, value in (kwargs or {}).items()}
        if function is torch.tensor and kwargs.get("device") == MPS:
            return function(*args, **{**kwargs, "device": "cpu"}).to(MPS)
        before = _Names.meta_is_meant
        given = [str(x) for x in (*args, kwargs.get("device")) if isinstance(x, str | torch.device)]
        _Names.meta_is_meant = before or "meta" in given
        try:
            return function(*args, **kwargs)
        finally:
            _Names.meta_is_meant = before


def _numbered(x: Any) -> Any:
    """Devices get a number, without which C++ asks the hardware for it."""
    return MPS if isinstance(x, torch.device) and x.type == "mps" else x


def moved(module: nn.Module) -> nn.Module:
    """The module, its parameters and buffers now on the device."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                there = nn.Parameter(on_mps(parameter.detach()), requires_grad=parameter.requires_grad)
                child._parameters[name] = there
        for name, buffer in child._buffers.items():
            child._buffers[name] = None if buffer is None else on_mps(buffer)
    return module


class Bus:
    """What moves modules between the host's memory and a device that computes nothing with the host's tensors.

    Attributes:
        here: modules that are on the device.
        seen: the classes of those that were there after each arrival.
    """

    def __init__(self) -> None:
        self.here: list[nn.Module] = []
        self.seen: list[tuple[str, ...]] = []

    @property
    def arrivals(self) -> int:
        """How often a module came."""
        return len(self.seen)

    @property
    def most(self) -> int:
        """How many were there at the same time."""
        return max(map(len, self.seen), default=0)

    def move(self, module: nn.Module, device: torch.device) -> None:
        """As ``models.turns.move``."""
        if device.type == "cpu" and any(module is each for each in self.here):
            self.here = [each for each in self.here if each is not module]
            for part in module.modules():
                for kept in (part._parameters, part._buffers):
                    for name, tensor in kept.items():
                        kept[name] = getattr(tensor, "inner", tensor)
        elif device == MPS and not any(module is each for each in self.here):
            self.here.append(module)
            self.seen.append(tuple(type(each).__name__ for each in self.here))
            moved(module)


def on_mps(tensor: Tensor) -> Tensor:
    """A copy on the device."""
    return _wrapped(tensor.detach().clone())


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation: whether the device has it, and its result on the device if it belongs there."""
    name = function._schema.name.removeprefix("aten::")
    flat, structure = tree_flatten((args, kwargs))
    tensors = [x for x in flat if isinstance(x, Tensor)]
    on_device = any(isinstance(x, MpsTensor) for x in tensors)
    asked = kwargs.get("device")
    homes = ("mps",) if _Names.meta_is_meant else ("mps", "meta")  # C++ asks for where it believes the tensors to be
    there = on_device if asked is None else torch.device(asked).type in homes
    if on_device:
        _check_operation(name, args, tensors)
    args, kwargs = tree_unflatten([_inner(x) for x in flat], structure)
    results = function(*args, **({**kwargs, "device": "cpu"} if there and asked is not None else kwargs))
    if on_device and name == "_to_copy":
        _refuse_float64(results)
    if not there:
        return results
    # what is changed in place stays the object that it was
    known = {id(_inner(x)): x for x in tensors}
    return tree_map_only(Tensor, lambda x: known[id(x)] if id(x) in known else _wrapped(x), results)


def _check_operation(name: str, args: Any, tensors: list[Tensor]) -> None:
    if name in MISSING:
        raise NotImplementedError(f"The operator 'aten::{name}' is not currently implemented for the MPS device.")
    if name in COPIES:
        _refuse_float64(args[0] if name != "_to_copy" else None)
    elif name not in INDEXED and any(x.dim() and not isinstance(x, MpsTensor) for x in tensors):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found mps and cpu in {name}")


def _refuse_float64(tree: Any) -> None:
    if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in tree_flatten(tree)[0]):
        raise TypeError(f"{FLOAT64} Please use float32 instead.")


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, MpsTensor) else x


def _wrapped(inner: Tensor) -> Tensor:
    _refuse_float64(inner)
    return MpsTensor(inner)
