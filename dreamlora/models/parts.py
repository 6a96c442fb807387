"""The parts of a base model: loaded when first asked for, each freed by itself."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dreamlora.interfaces import Components, Family, ModelSource, Role
from dreamlora.memory import StageMemory
from dreamlora.precision import quantize

DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ROLES: tuple[Role, ...] = ("text", "vae", "denoiser", "scheduler")


class Parts:
    """Parts of the base pipeline, loaded when first asked for.

    Args:
        family: the plug-in that loads them.
        source: the pipeline.
        device: where they go.
        dtype: of the denoiser and the text encoders. The autoencoder is float32: in half precision some give NaN.
    """

    def __init__(self, family: Family, source: ModelSource, device: torch.device, dtype: torch.dtype) -> None:
        self.family = family
        self.source = source
        self.device = device
        self._dtype = dtype
        self._loaded: dict[Role, Components] = {}

    def get(self, role: Role) -> Components:
        """The part, on the device."""
        if role not in self._loaded:
            dtype = torch.float32 if role == "vae" else self._dtype
            self._loaded[role] = self.family.load(self.source, role, dtype)
            self._quantize(role)
        for module in _modules(self._loaded[role]):
            module.to(self.device)
        return self._loaded[role]

    def put_away(self, role: Role) -> None:
        """Keep the part in the computer's memory until it is asked for again, if the device has one of its own."""
        if self.device.type == "cpu":
            return
        for module in _modules(self._loaded.get(role, {})):
            module.to("cpu")
        give_back_memory()

    def weights(self, role: Role) -> Iterator[Tensor]:
        """What a part holds that is loaded; without what trains in it."""
        for module in _modules(self._loaded.get(role, {})):
            yield from (one for one in (*module.parameters(), *module.buffers()) if not one.requires_grad)

    def _quantize(self, role: Role) -> None:
        words = {"denoiser": self.source.base_precision, "text": self.source.text_encoder_precision}
        if word := words.get(role):
            for module in self._loaded[role].values():
                if isinstance(module, nn.Module):
                    quantize(module, word, self.device)

    def free(self, *roles: Role) -> None:
        """Forget these parts; their memory is there for the next stage."""
        for role in roles:
            self._loaded.pop(role, None)
        gc.collect()
        give_back_memory()

    def pipeline(self) -> Any:
        """The whole base pipeline."""
        return self.family.pipeline({name: part for role in ROLES for name, part in self.get(role).items()})


def _modules(components: Components) -> list[nn.Module]:
    return [part for part in components.values() if isinstance(part, nn.Module)]


def watch(memory: StageMemory, parts: Parts) -> None:
    """Have the weights of these parts counted where memory does not suffice."""
    names: dict[Role, str] = {"denoiser": "denoiser", "text": "text encoders", "vae": "autoencoder"}
    for role, name in names.items():
        memory.holds(name, parts, functools.partial(Parts.weights, role=role))


def computing_in(dtype: torch.dtype, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """What accelerate gives a run of this precision: autocast, in which LoRAs stay float32; nothing for float32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def give_back_memory() -> None:
    """Return what has been freed to the device and the system; torch and the C library keep it otherwise."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL("libc.so.6").malloc_trim(0)
