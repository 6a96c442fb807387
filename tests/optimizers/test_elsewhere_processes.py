"""The optimizers on two processes: DistributedDataParallel; what tears pairs apart; what nobody synchronises."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import nn

from dreamlora.optimizers import ScaledAdamW, lora_param_groups
from tests.optimizers.language_models import (
    CLASSES,
    TOKENS,
    assert_close,
    gpt2,
    loss_of,
    optimizer_of,
    step,
    trained,
)

STEPS = 3
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def work(rank: int, folder: str) -> None:
    """What one of the two processes does; it leaves what it found in a file."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    mine = TOKENS[2 * rank : 2 * rank + 2]
    found: dict[str, Any] = {cls.__name__: parallel(cls, mine) for cls in CLASSES}
    found["sharded optimizer"] = sharded_optimizer()
    found["FSDP2"] = sharded_model(mine)
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()


def parallel(cls: Any, tokens: torch.Tensor) -> dict[str, Any]:
    model = gpt2(layers=1)
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = optimizer_of(cls, wrapped)
    for _ in range(STEPS):
        step(wrapped, optimizer, tokens)
    return {"weights": trained(model), "state": optimizer.state_dict()}


def sharded_optimizer() -> str:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    try:
        ZeroRedundancyOptimizer(lora_param_groups(gpt2()), optimizer_class=ScaledAdamW)
    except ValueError as error:
        return str(error)
    return "no error"


def sharded_model(tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """FSDP2 that ignores the LoRA, whose gradients are averaged as the documents say; nothing if torch is too old."""
    from torch.distributed.fsdp import fully_shard

    if "ignored_params" not in inspect.signature(fully_shard).parameters:
        return {}
    model = gpt2(layers=1)
    factors = [p for p in model.parameters() if p.requires_grad]
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (2,)), ignored_params=set(factors))
    optimizer = optimizer_of(ScaledAdamW, model)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, tokens).backward()
        for p in factors:
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()
        optimizer.step()
    return trained(model)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict[str, Any]]:
    """What the two processes found."""
    if not dist.is_available():
        pytest.skip("torch was built without torch.distributed")
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / str(rank), weights_only=True) for rank in range(2)]


def alone(cls: Any) -> Any:
    """The model after training with the whole batch in one process, and its optimizer."""
    model = gpt2(layers=1)
    optimizer = optimizer_of(cls, model)
    for _ in range(STEPS):
        step(model, optimizer)
    return model, optimizer


@every_class
def test_two_processes_hold_the_same_weights_and_those_of_one(cls, two):
    first, second = (found[cls.__name__]["weights"] for found in two)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    model, _ = alone(cls)
    assert_close(trained(model), first)


@every_class
def test_a_state_of_two_processes_goes_on_in_one(cls, two):
    (model, optimizer), (other, fresh) = alone(cls), alone(cls)
    fresh.load_state_dict(two[0][cls.__name__]["state"])
    other.load_state_dict(two[0][cls.__name__]["weights"], strict=False)
    step(model, optimizer)
    step(other, fresh)
    assert_close(trained(model), trained(other))


def test_an_optimizer_that_deals_parameters_out_is_refused(two):
    for found in two:
        assert "ZeroRedundancyOptimizer deals them out" in found["sharded optimizer"]


def test_fsdp2_around_the_lora_is_data_parallel_once_gradients_are_averaged(two):
    first, second = (found["FSDP2"] for found in two)
    if not first:
        pytest.skip("this torch's FSDP2 ignores no parameters")
    assert all(torch.equal(first[name], second[name]) for name in first)
    model, _ = alone(ScaledAdamW)
    assert_close(trained(model), first)
