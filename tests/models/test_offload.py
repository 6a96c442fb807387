"""Blocks that wait in host memory: the same numbers as without, whatever is computed with them, in whatever order.

The ring's buffers are CPU tensors here. ``Delayed`` copies as late as is allowed, and leaves nonsense in a buffer until
then, so that a block which does not wait, or whose buffer goes to another too early, gives other numbers.
"""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dreamlora import registry
from dreamlora.config import Lora, Model
from dreamlora.errors import UserError
from dreamlora.inits._start import Target
from dreamlora.lora.changes import change_of
from dreamlora.lora.inject import add_lora, trainable_parameters
from dreamlora.lora.pairs import adapted_layers, tuned_layers
from dreamlora.models import offload
from dreamlora.models.loading import family_of, resolve_source
from dreamlora.models.offload import Offload, blocks_of, waiting_blocks
from dreamlora.models.parts import Parts
from dreamlora.precision import quantize
from tests.delayed import Delayed

CPU = torch.device("cpu")


class StackBlock(nn.Module):
    """Frozen tensors of several kinds and sizes, and a factor that trains."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, hidden), nn.Linear(hidden, 8, dtype=torch.float64)
        self.register_buffer("shift", torch.randn(8))
        self.register_buffer("count", torch.tensor(3, dtype=torch.int64))
        self.empty = nn.Parameter(torch.empty(0))
        self.requires_grad_(False)
        self.factor = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.up(x + self.shift)) * self.count
        return x + self.factor * torch.tanh(self.down(hidden.double()).float())


class Stack(nn.Module):
    """Blocks with gradient checkpointing, behind a layer that is in none."""

    def __init__(self, count: int = 7) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedder = nn.Linear(4, 8).requires_grad_(False)
        self.refiner = nn.ModuleList([StackBlock(8)])
        self.blocks = nn.ModuleList([StackBlock(5 + 3 * number) for number in range(count)])
        self.checkpointing = True

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedder(x)
        for block in self.blocks:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x


def waiting(stack: Stack, count: int | None = None) -> Delayed:
    """Let blocks of it wait, all of them unless told otherwise; their factors come later, as a LoRA does."""
    factors = [block.factor for block in stack.blocks]
    for block in stack.blocks:
        del block.factor
    copies = Delayed()
    Offload(list(stack.blocks) if count is None else waiting_blocks(stack, count), CPU, copies)
    for block, factor in zip(stack.blocks, factors, strict=True):
        block.factor = factor
        block.register_forward_pre_hook(copies.compute)
    return copies


def gradients(stack: Stack, number: int) -> list[Tensor]:
    """The output and the gradients of one pass."""
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(number))
    stack.zero_grad()
    y = stack(x)
    y.square().sum().backward()
    return [y.detach(), *(block.factor.grad.clone() for block in stack.blocks)]


def equal(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("count", [1, 2, 3, 5, None])
def test_passes_of_all_kinds_in_any_order_give_the_same_bits(count: int | None) -> None:
    plain, offloaded = Stack(), Stack()
    waiting(offloaded, count)
    x = torch.randn(2, 4)
    for number, kind in enumerate("ttdtddttdt"):  # training, drawing
        if kind == "t":
            assert equal(gradients(offloaded, number), gradients(plain, number))
        else:
            with torch.no_grad():
                assert torch.equal(offloaded(x), plain(x))


def test_two_forward_passes_may_share_a_backward_pass() -> None:
    plain, offloaded = Stack(), Stack()
    waiting(offloaded)
    x = torch.randn(2, 2, 4)
    for stack in (plain, offloaded):
        (stack(x[0]).sum() * stack(x[1]).sum()).backward()
    assert equal([b.factor.grad for b in offloaded.blocks], [b.factor.grad for b in plain.blocks])


def test_a_block_may_stop_halfway() -> None:
    """As torch's checkpointing does, once it has what it came for."""
    plain, offloaded = Stack(), Stack()
    waiting(offloaded)
    handle = offloaded.blocks[3].down.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError("stop")))
    with pytest.raises(KeyError):
        gradients(offloaded, 0)
    handle.remove()
    assert equal(gradients(offloaded, 1), gradients(plain, 1))


def test_each_copy_is_started_one_block_ahead_once_the_order_is_known() -> None:
    stack = Stack()
    copies = waiting(stack)
    gradients(stack, 0)
    copies.missed = 0
    gradients(stack, 1)
    assert copies.missed == 0, "in training"
    x = torch.randn(2, 4)
    with torch.no_grad():
        stack(x)
        stack(x)
        copies.missed = 0
        stack(x)
    assert copies.missed == 0, "in drawing"
    gradients(stack, 2)
    copies.missed = 0
    gradients(stack, 3)
    assert copies.missed == 0, "after it"


def test_each_block_is_copied_once_forwards_and_once_backwards_but_for_those_that_are_there() -> None:
    stack = Stack()
    copies = waiting(stack)
    gradients(stack, 0)
    copies.started = 0
    gradients(stack, 1)
    assert copies.started == 2 * (len(stack.blocks) - 2)


def test_between_passes_every_weight_can_be_read() -> None:
    plain, offloaded = Stack(), Stack()
    waiting(offloaded)
    for number in range(2):
        same = zip(offloaded.state_dict().values(), plain.state_dict().values(), strict=True)
        assert all(torch.equal(one, other) for one, other in same)
        gradients(offloaded, number)


def test_moving_the_model_leaves_what_waits_where_it_is() -> None:
    stack = Stack()
    waiting(stack, 5)
    moved = stack.to("meta")
    blocks = set(waiting_blocks(moved, 5))
    assert moved.embedder.weight.is_meta and all(block.factor.is_meta for block in moved.blocks)
    for block in moved.blocks:
        places = {tensor.device.type for tensor in (block.up.weight, block.down.bias, block.shift, block.count)}
        assert places == {"cpu" if block in blocks else "meta"}


@pytest.mark.parametrize("adapter", registry.names("adapters"))
def test_an_adapter_goes_to_where_the_model_computes_though_its_layer_waits(adapter: str, flux_folder) -> None:
    model = FluxTransformer2DModel.from_pretrained(flux_folder, subfolder="transformer").requires_grad_(False)
    Offload(blocks_of(model), CPU)
    model.to("meta")
    add_lora(model, Lora(rank=2, adapter=adapter), ["to_q", "ff.net.2"])
    assert all(parameter.is_meta for parameter in trainable_parameters(model).values())
    assert {layer.layer.base_layer.weight.device.type for layer in tuned_layers(model)} == {"cpu"}


def test_a_weight_that_waits_is_read_where_the_adapter_is(flux_folder) -> None:
    model = FluxTransformer2DModel.from_pretrained(flux_folder, subfolder="transformer").requires_grad_(False)
    quantize(model, "int8", CPU, blocks_of(model)[:1])
    Offload(blocks_of(model), CPU)
    model.to("meta")
    add_lora(model, Lora(rank=2, adapter="dora"), ["to_q", "ff.net.2"])
    for layer in adapted_layers(model):
        assert Target(**vars(layer), key=()).weight().is_meta and layer.base_lengths().is_meta
        assert change_of(
            next(tuned for tuned in tuned_layers(model) if tuned.name == layer.name)
        ).rows.projected.is_meta


def test_what_waits_never_goes_through_the_device_when_it_is_loaded(sd_folder) -> None:
    source = resolve_source(Model(str(sd_folder), offload_blocks=2))
    parts = Parts(family_of(source), source, torch.device("meta"), torch.float32)
    for _ in range(2):
        unet = parts.get("denoiser")["unet"]
        waits = {parameter for block in waiting_blocks(unet, 2) for parameter in block.parameters()}
        assert {parameter.device.type for parameter in waits} == {"cpu"} and all(p.any() for p in waits if p.ndim > 1)
        assert all(parameter.is_meta for parameter in set(unet.parameters()) - waits)


def test_without_checkpointing_autograd_refuses_rather_than_use_another_blocks_weights() -> None:
    stack = Stack()
    waiting(stack)
    stack.checkpointing = False
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(stack, 0)


def test_weights_keep_the_order_of_their_numbers_in_memory() -> None:
    """A convolution with its channels innermost is another kernel, which rounds otherwise."""
    blocks = [nn.Sequential(nn.Conv2d(4, 4, 3)).to(memory_format=torch.channels_last) for _ in range(3)]
    weights = [block[0].weight for block in blocks]
    before = [weight.clone() for weight in weights]
    Offload(blocks, CPU)
    assert equal(weights, before)
    assert [weight.stride() for weight in weights] == [weight.stride() for weight in before]


def test_memory_that_cannot_be_pinned_is_the_computers(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA says of it what it says of a GPU's: out of memory."""
    cuda = SimpleNamespace(cudaHostRegister=lambda *_: 2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cuda)
    with pytest.raises(MemoryError, match="8 bytes of the computer's memory cannot be pinned"):
        offload._host_memory(8, torch.device("cuda"))


def test_a_model_that_nobody_holds_is_gone_at_once_with_all_that_waits() -> None:
    stack = Stack()
    waiting(stack)
    gradients(stack, 0)
    gc.collect()
    gc.disable()
    try:
        held = [weakref.ref(stack.blocks[0]), weakref.ref(stack.blocks[0].up.weight)]
        del stack
        assert [reference() for reference in held] == [None, None]
    finally:
        gc.enable()


def test_the_blocks_that_wait_are_spread_evenly_and_two_are_always_left() -> None:
    stack = Stack(12)
    assert blocks_of(stack) == list(stack.blocks)

    def places(count: int) -> list[int]:
        return [list(stack.blocks).index(block) for block in waiting_blocks(stack, count)]

    assert places(0) == []
    assert places(1) == [6]
    assert places(3) == [2, 6, 10]
    assert places(6) == [1, 3, 5, 7, 9, 11]
    assert len(set(places(10))) == 10
    with pytest.raises(UserError, match=r"--offload_blocks 11: this model has 12 blocks.*give at most 10"):
        waiting_blocks(stack, 11)
    with pytest.raises(UserError, match=r"--offload_blocks 1: this model has 2 blocks.*leave the flag out"):
        waiting_blocks(Stack(2), 1)
