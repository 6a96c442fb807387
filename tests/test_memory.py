"""Peaks of stages within stages, what lacked where, and how it is said; counted by a meter that can be set."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dreamlora.errors import LackOfMemoryError, UserError
from dreamlora.memory import (
    ALLOCATED,
    ELSEWHERE,
    GIB,
    RESERVED,
    RESIDENT,
    ProcessMeter,
    Shortage,
    StageMemory,
    allocator_advice,
    in_gib,
    in_words,
    shortage_told,
)

CPU = torch.device("cpu")


class Counter:
    """A device's count: what is held, and the most since ``reset``."""

    def __init__(self) -> None:
        self.held = self.peak = 0

    def reach(self, size: int) -> None:
        """Hold so much for a moment."""
        self.peak = max(self.peak, self.held + size)

    def reset(self) -> None:
        self.peak = self.held

    def peaks(self) -> dict[str, int]:
        return {ALLOCATED: self.peak, RESERVED: 2 * self.peak}


@pytest.fixture
def counter() -> Counter:
    return Counter()


@pytest.fixture
def memory(counter: Counter) -> StageMemory:
    return StageMemory(CPU, [counter])


def test_an_inner_stage_has_its_own_figure_and_does_not_spoil_the_outer_one(
    counter: Counter, memory: StageMemory
) -> None:
    counter.reach(3)
    with memory.stage("training"):
        counter.held = 5
        counter.reach(2)
        with memory.stage("drawing"):
            counter.reach(20)
            with memory.stage("decoding"):
                counter.reach(100)
            counter.reach(30)
        counter.reach(4)
        with memory.stage("drawing"):
            counter.reach(1)
    counter.held = 1
    peaks = {stage: kinds[ALLOCATED] for stage, kinds in memory.peaks().items()}
    assert peaks == {"training": 9, "drawing": 35, "decoding": 105, ELSEWHERE: 5}
    assert list(peaks) == ["training", "drawing", "decoding", ELSEWHERE], "in the order in which they began"
    assert memory.peaks()["drawing"][RESERVED] == 70


def test_a_stage_that_fails_is_counted_and_closed(counter: Counter, memory: StageMemory) -> None:
    with pytest.raises(ValueError, match="x"), memory.stage("first"):
        counter.reach(7)
        raise ValueError("x")
    with memory.stage("second"):
        counter.reach(2)
    assert {stage: kinds[ALLOCATED] for stage, kinds in memory.peaks().items()}["first"] == 7
    assert memory.shortage is None


def test_what_cannot_be_counted_is_left_out() -> None:
    memory = StageMemory(CPU, [])
    with memory.stage("training"):
        pass
    assert memory.peaks() == {} and in_words(memory.peaks()) == ""


def test_peaks_in_words_and_in_gib() -> None:
    peaks = {"training": {ALLOCATED: 3 * GIB, RESERVED: 4 * GIB, RESIDENT: GIB}}
    assert in_gib(peaks) == {"training": {ALLOCATED: 3.0, RESERVED: 4.0, RESIDENT: 1.0}}
    assert in_words(peaks) == "memory on the GPU at most, in GiB: training 3.00"
    of_process = "memory of this process at most, in GiB, where more than before: training 0.50"
    assert in_words({"training": {RESIDENT: GIB // 2}}) == of_process


def weights(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()


def test_a_shortage_has_its_stage_and_what_is_held_by_part(counter: Counter, memory: StageMemory) -> None:
    model, gone = nn.Linear(256, 256, bias=False), nn.Linear(256, 256, bias=False)
    memory.holds("denoiser", model, weights)
    memory.holds("denoiser", model, weights)  # the same storage counts once
    memory.holds("autoencoder", gone, weights)
    del gone
    gc.collect()
    with pytest.raises(MemoryError), memory.stage("training"), memory.stage("drawing samples"):
        counter.reach(GIB)
        raise MemoryError
    shortage = memory.shortage
    assert shortage is not None and shortage.stage == "drawing samples"
    assert shortage.held == {"denoiser": 4 * 256**2, "autoencoder": 0}


class Rounded(Tensor):
    """As an optimizer's state in 8 bits: it has no memory but that of the tensors that it is made of."""

    @staticmethod
    def __new__(cls, codes: Tensor) -> Rounded:
        made: Rounded = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
        made.codes = codes  # type: ignore[attr-defined]
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: object) -> Rounded:
        return cls(inner["codes"])

    @classmethod
    def __torch_dispatch__(cls, function: object, types: object, args: object = (), kwargs: object = None) -> None:
        raise NotImplementedError


def test_tensors_that_are_made_of_others_hold_what_these_hold(memory: StageMemory) -> None:
    owner = nn.Module()
    memory.holds("optimizer", owner, lambda _: [Rounded(torch.zeros(1000, dtype=torch.uint8)), torch.zeros(5)])
    memory.note(MemoryError())
    assert memory.shortage and memory.shortage.held == {"optimizer": 1020}


def test_the_sentence_says_all_that_is_known() -> None:
    held = {"denoiser": 5 * GIB, "autoencoder": 0, "LoRA, gradients and optimizer": GIB}
    assert str(Shortage("training", False, 7 * GIB, 8 * GIB, held)) == (
        "At most 7.00 of 8.00 GiB were in use on the GPU: denoiser 5.00, LoRA, gradients and optimizer 1.00, "
        "activations and all else 1.00"
    )
    assert str(Shortage("training", True)) == ""
    assert str(Shortage("training", True, held=held)).startswith("Held were, in GiB: denoiser 5.00, LoRA")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.81 GB, other allocations: 1.05 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("DataLoader worker (pid 4242) is killed by signal: Killed. "),
        MemoryError(),
    ],
    ids=str,
)
def test_every_kind_is_told_once_in_the_same_words(error: Exception, memory: StageMemory) -> None:

    def fail() -> None:
        with memory.stage("outer"), memory.stage("training"):
            raise error

    with pytest.raises(LackOfMemoryError) as told, shortage_told(memory, lambda shortage: f"try {shortage.stage}"):
        fail()
    text = str(told.value)
    assert text.startswith("memory does not suffice in the stage 'training' (") and "try training" in text


def test_what_is_no_lack_of_memory_is_left_alone(memory: StageMemory) -> None:
    for error in (RuntimeError("sizes do not match"), UserError("out of memory")):
        with pytest.raises(type(error)) as raised, shortage_told(memory, lambda _: "x"), memory.stage("training"):
            raise error
        assert raised.value is error
    assert memory.shortage is None or memory.shortage.stage != "training"


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_growing_segments_are_advised_unless_they_are_set(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for other in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(other, raising=False)
    assert "expandable_segments:True" in allocator_advice()
    monkeypatch.setenv(name, "max_split_size_mb:64,expandable_segments:True")
    assert allocator_advice() == ""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux counts so")
def test_a_process_is_known_to_have_come_farther_only_if_it_did() -> None:
    meter = ProcessMeter()
    mark = meter.peaks()[RESIDENT]
    meter.reset()
    assert meter.peaks() == {}
    large = bytearray(b"x" * (mark + 2**26))
    assert meter.peaks()[RESIDENT] > mark + 2**25
    meter.reset()
    del large
    assert meter.peaks() == {}, "nobody knows how far it comes below the mark"


def test_where_the_system_does_not_count_nothing_is_said(tmp_path: Path) -> None:
    assert ProcessMeter(tmp_path / "gone").peaks() == {}
    (tmp_path / "status").write_text("VmPeak: 9 kB\n", encoding="utf-8")
    assert ProcessMeter(tmp_path / "status").peaks() == {}
