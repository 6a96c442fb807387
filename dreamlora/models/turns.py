"""Text encoders that share a device: one is there at a time, the others wait in host memory.

Nobody who calls them needs to know. An encoder comes when it is called, whatever family's code calls it and in whatever
order, and the one before it goes. A change costs the time to copy both over the bus (about a second for 10 GB), so that
many prompts are encoded in the order of the encoders (``each``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from accelerate.utils import send_to_device
from torch import nn

HOST = torch.device("cpu")
TOGETHER = 32
"""Computations that go through the encoders together: so many for each time that these are copied there and back. What
encoders have answered to them lies in host memory: up to 70 MB each (HiDream's Llama)."""

X = TypeVar("X")
Y = TypeVar("Y")


class _Waits(Exception):
    """Another encoder has the device."""


@dataclass
class _Tape:
    """What encoders have answered to one computation, in the order of its calls; while it waits, in host memory."""

    answers: list[Any] = field(default_factory=list)
    position: int = 0


class Turns:
    """Modules, in host memory, that come onto a device when they are called.

    Args:
        modules: by their calls alone; what calls a part of one finds it in host memory.
        device: where they compute, and where their answers are.
    """

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        self._device = device
        self._here: nn.Module | None = None
        self._next: nn.Module | None = None
        self._tape: _Tape | None = None
        for module in modules:
            module.forward = functools.partial(self._call, module, module.forward)

    def each(self, compute: Callable[[X], Y], inputs: Sequence[X]) -> list[Y]:
        """``[compute(each) for each in inputs]``, with as few changes of the module for many as for one.

        A computation that calls a module before its turn ends there. It is begun anew when the turn has come, and given
        the answers that it has had: so it must do the same each time.
        """
        groups = (inputs[start : start + TOGETHER] for start in range(0, len(inputs), TOGETHER))
        return [result for group in groups for result in self._group(compute, group)]

    def _group(self, compute: Callable[[X], Y], inputs: Sequence[X]) -> list[Y]:
        results: dict[int, Y] = {}
        tapes = [_Tape() for _ in inputs]
        try:
            while len(results) < len(inputs):
                self._next = None
                for number, tape in enumerate(tapes):
                    if number not in results:
                        self._tape, tape.position = tape, 0
                        with suppress(_Waits):
                            results[number] = compute(inputs[number])
                        tape.answers = [] if number in results else send_to_device(tape.answers, HOST)
                if self._next is not None:
                    self._bring(self._next)
        finally:
            self._tape = None
        return [results[number] for number in range(len(inputs))]

    def leave(self) -> None:
        """Nobody is on the device."""
        if self._here is not None:
            move(self._here, HOST)
            self._here = None

    def _call(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        tape = self._tape
        if tape is not None:
            if tape.position < len(tape.answers):
                tape.position += 1
                return send_to_device(tape.answers[tape.position - 1], self._device)
            if self._here is not None and module is not self._here:
                self._next = self._next or module
                raise _Waits
        self._bring(module)
        answer = forward(*send_to_device(args, self._device), **send_to_device(kwargs, self._device))
        if tape is not None:
            tape.position += 1
            tape.answers.append(answer)
        return answer

    def _bring(self, module: nn.Module) -> None:
        if module is not self._here:
            self.leave()
            move(module, self._device)
            self._here = module


def move(module: nn.Module, device: torch.device) -> None:
    """Bring a module to a device."""
    module.to(device)
