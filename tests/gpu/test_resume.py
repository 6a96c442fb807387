"""A resumed run on a GPU ends as the uninterrupted one; a checkpoint of a GPU can be read without one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dreamlora import registry
from dreamlora.training import state
from tests.gpu.conftest import RATES, STEPS, Train, Trained

pytestmark = pytest.mark.gpu

HALF = STEPS // 2


@contextlib.contextmanager
def reproducible() -> Iterator[None]:
    """Kernels that give the same bits each time, and an error where there is none."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def in_two_halves(train: Train, precision: str, optimizer: str) -> tuple[Trained, Trained]:
    """An uninterrupted run, and one that goes on from its middle in a folder of its own."""
    whole = train(precision, optimizer)
    return whole, train(precision, optimizer, "--resume_from_checkpoint", str(whole.folder.checkpoint_dir(HALF)))


def lora_of(run: Trained) -> Tensor:
    """All weights in a row, in the order of their names."""
    return torch.cat([tensor.flatten() for _, tensor in sorted(load_file(run.folder.lora_file).items())])


@pytest.mark.parametrize("optimizer", ["scaled_adamw", "lora_rite"])
def test_where_kernels_are_reproducible_it_is_bitwise_the_same(train: Train, optimizer: str) -> None:
    with reproducible():
        whole, resumed = in_two_halves(train, "bf16", optimizer)
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        assert resumed.values(name) == whole.values(name)
    assert torch.equal(lora_of(resumed), lora_of(whole))


def test_else_it_is_the_same_but_for_rounding(train: Train, device: torch.device) -> None:
    """In fp16, so that the scale of the loss goes on too."""
    whole, resumed = in_two_halves(train, "fp16" if device.type == "cuda" else "bf16", "adamw")
    for name in ("train/loss", "eval/loss"):
        assert resumed.values(name) == pytest.approx(whole.values(name), rel=1e-3)
    middle = load_file(whole.folder.checkpoint_dir(HALF) / whole.folder.lora_file.name)
    moved = lora_of(whole) - torch.cat([tensor.flatten() for _, tensor in sorted(middle.items())])
    # Adam moves entries whose gradient is all rounding as far as the others
    assert (lora_of(resumed) - lora_of(whole)).norm() < 0.2 * moved.norm()


@pytest.mark.parametrize("optimizer", RATES)
def test_a_checkpoint_is_read_without_a_gpu(trained: Callable[[str, str], Trained], optimizer: str) -> None:
    folder = trained("bf16", optimizer).folder
    saved = state.open_checkpoint(folder.checkpoint_dir(STEPS)).state
    factors = [nn.Parameter(tensor) for tensor in saved["trainables"].values()]
    assert saved["step"] == STEPS and all(factor.device.type == "cpu" for factor in factors)
    plugin = registry.load("optimizers", optimizer)
    going_on = plugin.build([{"params": factors, "lora_pairs": True, "lr": 1e-3}], plugin.Options())
    going_on.load_state_dict(saved["optimizer"])
    before = [factor.detach().clone() for factor in factors]
    for factor in factors:
        factor.grad = torch.ones_like(factor)
    going_on.step()
    assert all(factor.isfinite().all() for factor in factors)
    assert not any(torch.equal(factor, old) for factor, old in zip(factors, before, strict=True))
