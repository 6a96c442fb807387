"""The parts of a base model: loaded when first asked for, each freed by itself."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dreamlora.interfaces import Components, Family, ModelSource, Role
from dreamlora.memory import StageMemory
from dreamlora.models import kernels
from dreamlora.models.offload import Offload, waiting_blocks
from dreamlora.models.turns import HOST, Turns, move
from dreamlora.precision import quantize

DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ROLES: tuple[Role, ...] = ("text", "vae", "denoiser", "scheduler")

X = TypeVar("X")
Y = TypeVar("Y")


class Parts:
    """Parts of the base pipeline, loaded when first asked for.

    Args:
        family: the plug-in that loads them.
        source: the pipeline.
        device: where they go.
        dtype: of the denoiser and the text encoders. The autoencoder is float32: in half precision some give NaN.
        training: names of the text encoders that train, which stay on the device.
    """

    def __init__(
        self,
        family: Family,
        source: ModelSource,
        device: torch.device,
        dtype: torch.dtype,
        training: Collection[str] = (),
    ) -> None:
        self.family = family
        self.source = source
        self.device = device
        self.text_device = torch.device(source.text_encoder_device or device)
        self._dtype = dtype
        self.training = training
        self._turns: Turns | None = None
        self._loaded: dict[Role, Components] = {}

    def get(self, role: Role) -> Components:
        """The part, on the device; text encoders that do not train on ``text_device``, where several of them take
        turns.
        """
        self._load(role)
        for name, module in self._modules(role):
            if role != "text" or name in self.training:
                move(module, self.device)
            elif self._turns is None:
                move(module, self.text_device)
        return self._loaded[role]

    @property
    def text(self) -> Components:
        """The text components, where they are."""
        return self._load("text")

    def _load(self, role: Role) -> Components:
        if role not in self._loaded:
            kernels.avoid_cudnn_attention()
            dtype = torch.float32 if role == "vae" else self._dtype
            self._loaded[role] = self.family.load(self.source, role, dtype)
            if role == "denoiser":
                kernels.arrange(self._loaded[role][self.family.DENOISER], self.source)
            self._settle(role)
            if role == "text":
                self._take_turns()
        return self._loaded[role]

    def weights(self, role: Role) -> Iterator[Tensor]:
        """What a part holds that is loaded; without what trains in it."""
        for _, module in self._modules(role) if role in self._loaded else ():
            yield from (one for one in (*module.parameters(), *module.buffers()) if not one.requires_grad)

    def _modules(self, role: Role) -> Iterator[tuple[str, nn.Module]]:
        for name, module in self._loaded[role].items():
            if isinstance(module, nn.Module):
                yield name, module

    def _settle(self, role: Role) -> None:
        """Weights in fewer bits, and blocks of the denoiser that wait in host memory."""
        words = {"denoiser": self.source.base_precision, "text": self.source.text_encoder_precision}
        count = self.source.offload_blocks if role == "denoiser" else 0
        for _, module in self._modules(role):
            waiting = waiting_blocks(module, count)
            if word := words.get(role):
                quantize(module, word, self.text_device if role == "text" else self.device, waiting)
                if role == "text":
                    move(module, HOST)
            if waiting:
                Offload(waiting, self.device)

    def _take_turns(self) -> None:
        frozen = [module for name, module in self._modules("text") if name not in self.training]
        if len(frozen) > 1 and self.text_device != HOST:
            self._turns = Turns(frozen, self.text_device)

    def in_turns(self, compute: Callable[[X], Y], inputs: Sequence[X]) -> list[Y]:
        """``compute`` of each, which calls text encoders: in an order in which these seldom come and go.

        Args:
            compute: does the same whenever it is called with the same (see ``Turns.each``).
            inputs: of the calls.
        """
        self._load("text")
        return self._turns.each(compute, inputs) if self._turns else [compute(each) for each in inputs]

    def rest(self, *roles: Role) -> None:
        """Let these parts, as far as they are loaded, wait in host memory until ``get`` asks for them."""
        if self.device == HOST:
            return
        for role in self._loaded.keys() & set(roles):
            for _, module in self._modules(role):
                move(module, HOST)
        if self._turns and "text" in roles:
            self._turns.leave()
        give_back_memory()

    @contextlib.contextmanager
    def text_alone(self) -> Iterator[None]:
        """In here the text encoders have their device for themselves, afterwards nobody has it: where that is not the
        computer's own memory, the other parts wait there, and the text encoders do afterwards.
        """
        if self.text_device != HOST:
            self.rest("vae", "denoiser")
        try:
            yield
        finally:
            self.rest("text")

    def forget_frozen_text(self) -> None:
        """Forget the text encoders that do not train."""
        text = self._load("text")
        for name in [name for name, _ in self._modules("text") if name not in self.training]:
            del text[name]
        self._turns = None

    def free(self, *roles: Role) -> None:
        """Forget these parts; their memory is there for the next stage."""
        for role in roles:
            self._loaded.pop(role, None)
        if "text" in roles:
            self._turns = None
        gc.collect()
        give_back_memory()

    def pipeline(self) -> Any:
        """The whole base pipeline, on its device."""
        return self._pipeline(self.get, ROLES)

    def drawer(self) -> Any:
        """The base pipeline without text encoders, which draws from ready embeddings."""
        return self._pipeline(self.get, ("vae", "denoiser", "scheduler"))

    def resting_pipeline(self) -> Any:
        """The whole base pipeline with its parts where they are, to load LoRAs into."""
        return self._pipeline(self._load, ROLES)

    def _pipeline(self, part: Callable[[Role], Components], roles: Sequence[Role]) -> Any:
        return self.family.pipeline({name: each for role in roles for name, each in part(role).items()})


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
