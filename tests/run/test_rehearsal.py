"""The estimate beside what a real pass on the CPU holds, counted tensor by tensor."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dreamlora.cli.parse import parse_run
from dreamlora.lora.inject import trainable_parameters
from dreamlora.run import opening
from dreamlora.run.rehearsal import Rehearsal, state_bytes
from dreamlora.run.trainable import add_adapter
from dreamlora.run.vram import with_options
from dreamlora.training.loop import Predictor
from tests.real_sizes import wide


class Held(TorchDispatchMode):
    """The most that results of operations hold at a time."""

    def __init__(self, known: Any) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        weakref.finalize(storage, self._forget, key, size).atexit = False
        self._now += size
        self.peak = max(self.peak, self._now)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._now -= size


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return wide(tmp_path_factory.mktemp("models") / "flux")


def begun(model: Path, *more: str) -> Any:
    flags = f"--pretrained_model_name_or_path {model} --instance_data_dir {model} --max_train_steps 2 --resolution 64"
    flags += " --train_batch_size 2 --max_sequence_length 64"
    return opening.begin(parse_run([*flags.split(), *more])[0])


def measured(context: Any, rehearsal: Rehearsal) -> int:
    """Bytes that a micro-batch holds besides the weights, in the parts that a training has."""
    family, config = context.family, context.config
    denoiser = context.parts.get("denoiser")[family.DENOISER]
    add_adapter(context, family.DENOISER, denoiser)
    if config.model.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    model = Predictor(family, denoiser.train(), None, config.train.guidance_scale)
    noisy, times, conditioning = rehearsal.passes._inputs(2)
    inputs = torch.randn(noisy.shape), times, {name: torch.zeros(one.shape) for name, one in conditioning.items()}
    with Held([*model.parameters(), *model.buffers()]) as held:
        torch.autograd.backward((model(*inputs).float() ** 2).sum())
    return held.peak


@pytest.mark.parametrize("more", [[], ["--gradient_checkpointing"]])
@pytest.mark.parametrize("word", [None, "int8", "fp8", "nf4"])
def test_a_step_takes_what_the_estimate_says(word: str | None, more: list[str], model: Path, request: Any) -> None:
    if word == "nf4":
        request.getfixturevalue("bitsandbytes")
    context = begun(model, *([] if word is None else ["--base_precision", word]), *more)
    rehearsal = Rehearsal(context, "a dog", (64, 64), 0)
    training = next(stage for stage in rehearsal.stages() if stage.name == "training")
    assert measured(context, rehearsal) == pytest.approx(training.work, rel=0.15)


@pytest.mark.parametrize("word", ["int8", "fp8", "nf4"])
def test_weights_take_what_the_estimate_says(word: str, model: Path, request: Any) -> None:
    if word == "nf4":
        request.getfixturevalue("bitsandbytes")
    context = begun(model, "--base_precision", word)
    denoiser = context.parts.get("denoiser")[context.family.DENOISER]
    held = sum(one.numel() * one.element_size() for one in (*denoiser.parameters(), *denoiser.buffers()))
    rehearsal = Rehearsal(context, "a dog", (64, 64), 0)
    estimated = rehearsal.held(context.config) - rehearsal._lora
    assert estimated == pytest.approx(held, rel=1e-3)


def test_waiting_blocks_leave_room_for_the_ring(model: Path) -> None:
    context = begun(model)
    rehearsal = Rehearsal(context, "a dog", (64, 64), 0)
    everything = rehearsal.held(context.config)
    assert rehearsal.most_offloaded == 4
    waiting = rehearsal.held(with_options(context.config, {"offload_blocks": 4}))
    largest = max(block.bytes(None) for block in rehearsal.passes.waiting(4))
    away = sum(block.bytes(None) for block in rehearsal.passes.waiting(4))
    assert everything - waiting == away - 2 * largest > 0


OPTIMIZERS = [("adamw", 8), ("sgd", 0), ("lion", 4), ("schedulefree_adamw", 8)]


@pytest.mark.parametrize(("name", "bytes_each"), OPTIMIZERS)
def test_each_optimizer_keeps_its_own_state(name: str, bytes_each: int, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    config, _ = parse_run(["--optimizer", name, "--instance_data_dir", str(tmp_path)])
    assert state_bytes(config) == pytest.approx(bytes_each, abs=0.01)
    assert torch.equal(before, torch.get_rng_state())


def test_lora_is_not_counted_among_the_weights(model: Path) -> None:
    context = begun(model, "--rank", "64")
    rehearsal = Rehearsal(context, "a dog", (64, 64), 0)
    before = rehearsal.passes.stored[context.family.DENOISER].bytes(None)
    numbers = rehearsal.passes.parameters()
    assert rehearsal.held(context.config) == pytest.approx(before + 16 * numbers, rel=1e-3)
    denoiser = context.parts.get("denoiser")[context.family.DENOISER]
    add_adapter(context, context.family.DENOISER, denoiser)
    assert numbers == sum(one.numel() for one in trainable_parameters(denoiser).values())
