"""Blocks whose frozen weights wait in host memory, and are copied to the device ahead of their use.

A run holds two of these blocks on the device at a time, in a ring of two buffers: one that computes, and one that is
being copied while it does. Forwards the next block is the one behind; in the recomputation of gradient checkpointing,
backwards, the one before. Nothing is ever copied back, as nothing there trains: what trains (a LoRA's factors) stays on
the device. The numbers are the same to the last bit.

The blocks are spread evenly over the model, so that each copy has the time in which the blocks in between, which stay
on the device, compute; the last N side by side would each have that of one block.
"""

from __future__ import annotations

import contextlib
import functools
import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from dreamlora.errors import UserError

SLOTS = 2
"""Buffers in the ring."""
_ALIGNED = 256
"""Bytes that tensors begin at multiples of, as in memory of their own: kernels rely on it."""
Pass = Literal["drawing", "forwards", "backwards"]
Apply = Callable[[Tensor], Tensor]


def blocks_of(denoiser: nn.Module) -> list[nn.Module]:
    """The repeated blocks that gradient checkpointing recomputes one by one: all of a transformer but its refiners (few
    and small), or the transformer blocks of a UNet.
    """
    stacks = [child for name, child in denoiser.named_children() if "refiner" not in name]
    entries = (entry for stack in stacks if isinstance(stack, nn.ModuleList) for entry in stack)
    blocks = [entry for entry in entries if type(entry).__name__.endswith("Block")]
    return blocks or [module for module in denoiser.modules() if isinstance(module, BasicTransformerBlock)]


def waiting_blocks(denoiser: nn.Module, count: int) -> list[nn.Module]:
    """Those that ``--offload_blocks`` means.

    Raises:
        UserError: the model has not so many.
    """
    blocks = blocks_of(denoiser)
    most = max(len(blocks) - SLOTS, 0)
    if count > most:
        remedy = f"give at most {most}" if most else "leave the flag out"
        raise UserError(
            f"--offload_blocks {count}: this model has {len(blocks)} blocks, and there is room for {SLOTS} of them on "
            f"the device in any case: {remedy}"
        )
    return [blocks[(2 * number + 1) * len(blocks) // (2 * count)] for number in range(count)]


class Copies:
    """Copies from host memory into the buffers of a ring, each made at once: for devices without streams."""

    def start(self, slot: int, buffer: Tensor, master: Tensor) -> None:
        """Begin to copy; whatever was asked of the device so far may still use the buffer.

        Args:
            slot: number of the buffer.
            buffer, master: bytes, equally many.
        """
        buffer.copy_(master)

    def wait(self, slot: int) -> None:
        """What is asked of the device from now on finds the copy complete."""

    def end(self) -> None:
        """Return when all copies are complete."""


class StreamCopies(Copies):
    """Copies that a stream of their own makes while the device computes.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._done = [torch.cuda.Event() for _ in range(SLOTS)]

    def start(self, slot: int, buffer: Tensor, master: Tensor) -> None:
        """As ``Copies``; returns at once."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            buffer.copy_(master, non_blocking=True)
        self._done[slot].record(self._stream)

    def wait(self, slot: int) -> None:
        """As ``Copies``; the GPU waits, not the program."""
        torch.cuda.current_stream(self._device).wait_event(self._done[slot])

    def end(self) -> None:
        """As ``Copies``."""
        self._stream.synchronize()


class Offload:
    """The ring, and the blocks that take turns in it; alive as long as they are.

    Between passes the tensors of a block are in host memory, or in the ring if it was used last: whoever reads a weight
    then finds its numbers, and brings them to where they are needed. ``to`` leaves them there.

    Args:
        blocks: frozen; what is added to them later is none of their waiting weights.
        device: where they compute.
        copies: None: those of the device.
    """

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, copies: Copies | None = None) -> None:
        self._copies = copies or (StreamCopies(device) if device.type == "cuda" else Copies())
        self._blocks: list[_WaitingBlock] = []
        for number, block in enumerate(blocks):
            self._blocks.append(_WaitingBlock(block, device))
            block.register_forward_pre_hook(functools.partial(self._before, number), prepend=True)
        largest = max(len(block.master) for block in self._blocks)
        buffers = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(min(SLOTS, len(blocks)))]
        for held in self._blocks:
            held.places = [buffer[: len(held.master)] for buffer in buffers]
        self._held: list[int | None] = [None] * len(buffers)
        self._used = 0
        self._last: tuple[Pass, int] | None = None
        self._next: dict[tuple[Pass, int], int] = {}
        masters = [block.master for block in self._blocks]
        weakref.finalize(self, _end, self._copies, masters if device.type == "cuda" else [])

    def _before(self, number: int, *_: Any) -> None:
        """Have a block on the device before it computes, and the one after it on its way."""
        slot = self._load(number)
        self._copies.wait(slot)
        self._blocks[number].move_to(slot)
        self._used = slot
        following = self._following(number)
        if following is not None:
            self._load(following)

    def _following(self, number: int) -> int | None:
        """The block that came after this one when a pass of this kind was last made; None: that is not known yet."""
        kind, last = _this_pass(), self._last
        if last and last[0] == kind:
            self._next[last] = number
            if kind == "forwards":
                self._next["backwards", number] = last[1]
        self._last = kind, number
        return self._next.get((kind, number))

    def _load(self, number: int) -> int:
        """Where the block is, or will be: in the buffer that was not used last.

        The block that lies there has done its work of this pass. The copy waits for what the device has been asked so
        far: backwards this is all of that block's gradients too, since autograd comes to the recomputation of an
        earlier block only after the last operation of a later one.
        """
        if number in self._held:
            return self._held.index(number)
        slot = (self._used + 1) % len(self._held)
        before = self._held[slot]
        if before is not None:
            self._blocks[before].move_to(None)
        self._held[slot] = number
        self._copies.start(slot, self._blocks[number].places[slot], self._blocks[number].master)
        return slot


class _Piece(NamedTuple):
    """Where a tensor lies in its block's bytes."""

    tensor: Tensor
    offset: int
    strides: tuple[int, ...]

    def view(self, flat: Tensor) -> Tensor:
        held = flat[self.offset : self.offset + self.tensor.nbytes]
        return held.view(self.tensor.dtype).as_strided(self.tensor.shape, self.strides)


class _WaitingBlock:
    """The tensors of one block: ``master`` has their bytes, ``places`` are the parts of the buffers that take them."""

    def __init__(self, block: nn.Module, device: torch.device) -> None:
        tensors = list(chain(block.parameters(), block.buffers()))
        ends = [0]
        for tensor in tensors:
            ends.append(ends[-1] + math.ceil(tensor.nbytes / _ALIGNED) * _ALIGNED)
        strides = [torch.empty_like(tensor, device="meta").stride() for tensor in tensors]  # as now, without gaps
        self._pieces = list(map(_Piece, tensors, ends, strides))
        self.master = _host_memory(ends[-1], device)
        self.places: list[Tensor] = []
        self._slot: int | None = None
        for piece in self._pieces:
            place = piece.view(self.master)
            place.copy_(piece.tensor)
            piece.tensor.data = place
        waiting = set(map(id, tensors))
        block._apply = functools.partial(_apply_to_others, weakref.ref(block), waiting)  # type: ignore[method-assign]

    def move_to(self, slot: int | None) -> None:
        """Let the tensors be those of a buffer; None: those that wait."""
        if slot == self._slot:
            return
        flat = self.master if slot is None else self.places[slot]
        for piece in self._pieces:
            piece.tensor.data = piece.view(flat)
            # Should autograd have kept it for the backward pass, where no checkpointing reads it anew, it must refuse
            torch.autograd.graph.increment_version(piece.tensor)
        self._slot = slot


def _this_pass() -> Pass:
    if torch._C._current_graph_task_id() != -1:
        return "backwards"
    return "forwards" if torch.is_grad_enabled() else "drawing"


def _apply_to_others(block: Callable[[], Any], waiting: set[int], fn: Apply, recurse: bool = True) -> nn.Module:
    """``Module._apply``, which moves modules, for all tensors but those that wait."""
    module: nn.Module = block()
    return type(module)._apply(module, lambda tensor: tensor if id(tensor) in waiting else fn(tensor), recurse)


def _host_memory(size: int, device: torch.device) -> Tensor:
    """Bytes that a GPU can read while the program goes on. Torch's own pinned memory is rounded up to a power of two,
    which for a large model is half as much again.

    Raises:
        MemoryError: the system does not give so many.
    """
    memory = torch.empty(size, dtype=torch.uint8)
    if device.type == "cuda" and int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), size, 0)):
        raise MemoryError(f"{size} bytes of the computer's memory cannot be pinned for the GPU")
    return memory


def _end(copies: Copies, masters: Iterable[Tensor]) -> None:
    """Let the host memory go, which nothing may be read from any more."""
    with contextlib.suppress(RuntimeError):  # the GPU may be what has failed
        copies.end()
    for master in masters:
        torch.cuda.cudart().cudaHostUnregister(master.data_ptr())
