"""Optimizers inside torch's own frameworks: DistributedDataParallel, DTensor, torch.compile."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dreamlora.optimizers import LoRAMuon, LoRARITE, LoRATSD, ScaledAdamW, ScaledGD, find_lora_pairs, lora_param_groups
from tests.optimizers.lora_problems import make_pairs, pair_group, quadratic_gradients, targets


class Adapted(nn.Module):
    """A linear layer with LoRA factors under PEFT's names."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 5).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(6, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 5, bias=False)})

    def forward(self, x):
        return self.base(x) + self.lora_B["default"](self.lora_A["default"](x))


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone."""
    if not dist.is_available():
        pytest.skip("torch was built without torch.distributed")
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_distributed_data_parallel_changes_nothing(one_process):
    products = []
    for wrap in (False, True):
        torch.manual_seed(0)
        module = Adapted()
        model = nn.parallel.DistributedDataParallel(module) if wrap else module
        optimizer = ScaledAdamW(lora_param_groups(model), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(2, 6)).square().mean().backward()
            optimizer.step()
        products.append(module.lora_B["default"].weight @ module.lora_A["default"].weight)
    assert len(find_lora_pairs(model)) == 1
    assert torch.equal(*products)


def test_factors_sharded_by_fsdp2_are_refused_before_and_after_construction(one_process):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    pairs = make_pairs(((4, 5, 2),))
    sharded = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in pairs[0]]
    with pytest.raises(ValueError, match="LoRA parameters out of FSDP"):
        ScaledAdamW([pair_group([tuple(sharded)])])
    optimizer = ScaledAdamW([pair_group(pairs)])
    quadratic_gradients(pairs, targets(pairs))
    for p, gradient in zip(sharded, [p.grad for p in pairs[0]], strict=True):
        p.grad = distribute_tensor(gradient, mesh, [Shard(0)])
    optimizer.param_groups[0]["params"] = sharded  # fully_shard replaces the parameters of a module
    with pytest.raises(ValueError, match="LoRA parameters out of FSDP"):
        optimizer.step()


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (ScaledAdamW, {}),
        (ScaledAdamW, {"variant": "split"}),
        (ScaledGD, {"momentum": 0.9, "geometry": "tangent"}),
        (LoRARITE, {}),
        (LoRAMuon, {}),
        (LoRATSD, {}),
    ],
    ids=["adamw", "split", "gd-tangent", "rite", "muon", "tsd"],
)
def test_a_compiled_step_is_the_step(cls, options):
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        pairs = make_pairs(((4, 5, 2), (4, 5, 2)))
        optimizer = cls([pair_group(pairs)], lr=1e-2, **options)
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(3):
            quadratic_gradients(pairs, targets(pairs))
            step()
        results.append([p.detach() for pair in pairs for p in pair])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)
