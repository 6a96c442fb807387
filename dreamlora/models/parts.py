"""The parts of a base model: loaded when first asked for, each freed by itself."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from typing import Any

import torch
from torch import nn

from dreamlora.interfaces import Components, Family, ModelSource, Role
from dreamlora.models.offload import Offload, waiting_blocks
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
            self._settle(role)
        for module in self._loaded[role].values():
            if isinstance(module, nn.Module):
                module.to(self.device)
        return self._loaded[role]

    def _settle(self, role: Role) -> None:
        """Weights in fewer bits, and blocks of the denoiser that wait in host memory."""
        words = {"denoiser": self.source.base_precision, "text": self.source.text_encoder_precision}
        count = self.source.offload_blocks if role == "denoiser" else 0
        for module in self._loaded[role].values():
            if isinstance(module, nn.Module):
                waiting = waiting_blocks(module, count)
                if word := words.get(role):
                    quantize(module, word, self.device, waiting)
                if waiting:
                    Offload(waiting, self.device)

    def free(self, *roles: Role) -> None:
        """Forget these parts; their memory is there for the next stage."""
        for role in roles:
            self._loaded.pop(role, None)
        gc.collect()
        give_back_memory()

    def pipeline(self) -> Any:
        """The whole base pipeline."""
        return self.family.pipeline({name: part for role in ROLES for name, part in self.get(role).items()})


def computing_in(dtype: torch.dtype, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """What accelerate gives a run of this precision: autocast, in which LoRAs stay float32; nothing for float32."""
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


def give_back_memory() -> None:
    """Return what has been freed to the device and the system; torch and the C library keep it otherwise."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # glibc alone has it
        ctypes.CDLL("libc.so.6").malloc_trim(0)
