"""A training step waits for the device once: for its loss and the norm of its gradients, together."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dreamlora.callbacks.log import LogCallback
from dreamlora.families import _packed
from dreamlora.interfaces import Batch
from dreamlora.optimizers import _kernels
from dreamlora.training import loop
from dreamlora.training.loop import Run
from dreamlora.training.stream import moved
from tests.training.conftest import with_optimizer

OURS = ("adamw", "lora_plus", "sgd", "scaled_gd", "scaled_adamw", "lora_muon", "lora_rite", "lora_tsd", "muon")
"""Those of other packages wait as they like."""
FAMILIES = ("sd", "flux")
clipped_or_not = pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])


@pytest.fixture(scope="module", params=FAMILIES)
def prepared(request: pytest.FixtureRequest, prepare: Callable[..., Run]) -> Run:
    more = ("--snr_gamma", "5") if request.param == "sd" else ("--weighting_scheme", "logit_normal")
    run = prepare(request.getfixturevalue(f"{request.param}_folder"), "--lora_layers", "all", *more)
    run.model.train()
    return run


# On the CPU: what is read is counted.


class Reads(TorchFunctionMode):
    """Counts what would wait for a GPU if the tensors lay on one."""

    NAMES = ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__", "nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in self.NAMES:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OURS)
@clipped_or_not
def test_a_step_reads_once_and_the_log_reads_nothing_more(
    prepared: Run, name: str, max_grad_norm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = with_optimizer(prepared, name, max_grad_norm=max_grad_norm)
    batches = loop.next_batches(run, 0, 0)
    monkeypatch.setattr(loop, "next_batches", lambda *_: batches)  # drawing them is the CPU's work
    log = LogCallback()
    log.on_start(run)
    for _ in range(2):
        with Reads() as reads:
            result, _ = loop.optimizer_step(run, batches)
            log.on_step(run, result)
    assert reads.counts == {"tolist": 1}


# On a device without values, "meta": whatever needs one fails, so what a step does without values waits for nothing.


class Copies(TorchDispatchMode):
    """Where tensors were copied from the CPU to the device in a way that waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        copied = function is torch.ops.aten._to_copy.default and device is not None and device.type != "cpu"
        if copied and args[0].device.type == "cpu" and not kwargs.get("non_blocking"):
            self.shapes.append(tuple(args[0].shape))
        return function(*args, **kwargs)


class OnMeta:
    """An accelerator whose device is "meta"."""

    device = torch.device("meta")

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)


@contextlib.contextmanager
def on_meta(run: Run, name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Run, list[Batch]]]:
    """The run without values, and its first batches; the model is put back afterwards."""
    from torch.optim import adam

    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # does not know the device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda _: None)
    monkeypatch.setattr(_kernels, "_FUSED_DEVICES", ("cpu", "cuda", "meta"))
    monkeypatch.setattr(torch, "_fused_sgd_", lambda *_, **__: None)  # torch has it for real devices only
    _packed.image_ids.cache_clear()  # what counts memory keeps positions with values for this device
    batches = loop.next_batches(run, 0, 0)
    moved = [
        (owner, kind, key, value)
        for module in run.model.modules()
        for owner, kind in ((module._parameters, "parameter"), (module._buffers, "buffer"))
        for key, value in owner.items()
        if value is not None
    ]
    for owner, kind, key, value in moved:
        empty = torch.empty_like(value, device="meta")
        owner[key] = nn.Parameter(empty, requires_grad=value.requires_grad) if kind == "parameter" else empty
    meta = with_optimizer(run, name)
    meta.trainables = {
        key: p for key, p in run.accelerator.unwrap_model(run.model).named_parameters() if p.requires_grad
    }
    meta.accelerator = OnMeta(run.accelerator)  # type: ignore[assignment]
    try:
        yield meta, [_on_meta(batch) for batch in batches]
    finally:
        for owner, _, key, value in moved:
            owner[key] = value


def _on_meta(batch: Batch) -> Batch:
    tensors = {field: getattr(batch, field).to("meta") for field in ("latents", "noise", "times", "weights")}
    return dataclasses.replace(batch, **tensors, conditioning={k: v.to("meta") for k, v in batch.conditioning.items()})


@pytest.mark.parametrize("name", [name for name in OURS if name != "muon"])  # torch's, and ten times slower there
def test_a_step_needs_no_value_but_what_it_reads(prepared: Run, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[Tensor, Tensor]] = []
    monkeypatch.setattr(loop, "read", lambda *tensors: read.append(tensors) or (1.0, 1.0, 0.0))  # type: ignore[func-returns-value]
    with on_meta(prepared, name, monkeypatch) as (run, batches):
        monkeypatch.setattr(loop, "next_batches", lambda *_: batches)
        loop.optimizer_step(run, batches)
        with Copies() as copies:
            loop.optimizer_step(run, batches)
    assert len(read) == 2 and all(tensor.device.type == "meta" for tensor in read[-1])
    assert copies.shapes == []


def test_batches_are_pinned_and_copied_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.calls: list[Any] = []

        def pin_memory(self) -> Recorder:
            self.calls.append("pinned")
            return self

        def to(self, device: torch.device, non_blocking: bool = False) -> Recorder:
            self.calls.append((device.type, non_blocking))
            return self

    for device, calls in (("cuda", ["pinned", ("cuda", True)]), ("cpu", [("cpu", True)])):
        names = ("latents", "noise", "times", "weights")
        tensors = {name: Recorder() for name in names}
        text = Recorder()
        moved(Batch(**tensors, conditioning={"text": text}, names=()), torch.device(device))  # type: ignore[arg-type]
        assert [each.calls for each in (*tensors.values(), text)] == [calls] * 5


# On a GPU: torch itself says what waits.


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", OURS)
@clipped_or_not
def test_torch_sees_no_other_synchronisation(
    prepared: Run, name: str, max_grad_norm: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = with_optimizer(prepared, name, max_grad_norm=max_grad_norm)
    batches = loop.next_batches(run, 0, 0)
    for _ in range(2):  # first steps make states and choose kernels
        _, batches = loop.optimizer_step(run, batches)
    read, calls = loop.read, []

    def allowed(*tensors: Tensor) -> list[float]:
        torch.cuda.set_sync_debug_mode("default")
        calls.append(read(*tensors))
        torch.cuda.set_sync_debug_mode("error")
        return calls[-1]

    monkeypatch.setattr(loop, "read", allowed)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(2):
            _, batches = loop.optimizer_step(run, batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == 2
