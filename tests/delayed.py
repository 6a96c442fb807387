"""Copies into a ring's buffers that show what does not wait for them: a stream that is never in time by itself."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dreamlora.models.offload import Copies

NONSENSE = 255
"""In every byte; as floating point numbers that is NaN."""


class Delayed(Copies):
    """Copies that are made when they are waited for; until then there is nonsense in the buffer.

    Attributes:
        started: copies.
        missed: waits for a copy that no block has computed since the start of.
    """

    def __init__(self) -> None:
        self._pending: dict[int, tuple[Tensor, Tensor, int]] = {}
        self._blocks = 0
        self.started = self.missed = 0

    def start(self, slot: int, buffer: Tensor, master: Tensor) -> None:
        buffer.fill_(NONSENSE)
        self._pending[slot] = buffer, master, self._blocks
        self.started += 1

    def wait(self, slot: int) -> None:
        if slot in self._pending:
            buffer, master, begun = self._pending.pop(slot)
            buffer.copy_(master)
            self.missed += begun == self._blocks

    def compute(self, *_: Any) -> None:
        """A block computes: a hook of those that are counted."""
        self._blocks += 1
