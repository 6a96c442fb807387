"""The fused layer computes what PEFT's computes, and leaves to PEFT what it does not know."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dreamlora.lora import fused
from dreamlora.lora.fused import FusedLinear, fuse
from dreamlora.lora.pairs import ADAPTER, adapted_layers

SHAPES = {"vectors": (5, 12), "sequences": (3, 7, 12), "one vector": (12,)}
ROUNDING = {"rtol": 1e-5, "atol": 1e-4}  # gradients here are of size 100


def layers(dtype: torch.dtype = torch.float32, *, bias: bool = True, **options: object) -> tuple[Linear, FusedLinear]:
    """The same layer of PEFT's and fused, with a lora_B that is not zero."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 9, bias=bias)).to(dtype)
        config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["0"], **options})
        layer = inject_adapter_in_model(config, net)[0]
        nn.init.normal_(layer.lora_B[ADAPTER].weight)
        made.append(layer)
    fuse(made[1])
    assert type(made[0]) is Linear and type(made[1]) is FusedLinear
    return made[0], made[1]


def results(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, and gradients of a loss that is not linear in it."""
    x = x.clone().requires_grad_()
    y = layer(x)
    (y.float() ** 2).sum().backward()
    assert x.grad is not None
    grads = {name: p.grad for name, p in layer.named_parameters() if p.requires_grad}
    assert len(grads) == 2
    return {"y": y.detach(), "x": x.grad, **grads}


def same(plain: nn.Module, layer: nn.Module, x: Tensor, **tolerance: float) -> bool:
    expected, got = results(plain, x), results(layer, x)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, **tolerance)
        assert got[name].dtype == value.dtype
    return True


@pytest.fixture
def fused_calls(monkeypatch) -> list[tuple]:
    """Collects the calls of the fused operation."""
    calls: list[tuple] = []
    apply = fused._LoraLinear.apply
    monkeypatch.setattr(fused._LoraLinear, "apply", lambda *given: calls.append(given) or apply(*given))
    return calls


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("alpha", [4, 6, 0.5])
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_those_of_peft(shape, alpha, bias, fused_calls):
    plain, layer = layers(bias=bias, lora_alpha=alpha)
    assert same(plain, layer, torch.randn(shape), **ROUNDING)
    assert len(fused_calls) == 1


def test_gradients_are_those_of_the_function():
    _, layer = layers(torch.float64)
    A, B = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight

    def function(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return fused._LoraLinear.apply(x, layer.base_layer, A, B, 0.5)

    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    inputs = [t.detach().double().requires_grad_() for t in (x, A, B)]
    assert torch.autograd.gradcheck(function, inputs)


def test_inputs_with_gaps_are_taken(fused_calls):
    plain, layer = layers()
    assert same(plain, layer, torch.randn(3, 12, 7).mT, **ROUNDING)
    assert len(fused_calls) == 1


def test_an_input_without_gradient(fused_calls):
    plain, layer = layers()
    x = torch.randn(5, 12)
    for each in (plain, layer):
        each(x).sum().backward()
    assert len(fused_calls) == 1
    for (name, p), (_, q) in zip(plain.named_parameters(), layer.named_parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(q.grad, p.grad, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_keeps_fp32_gradients(dtype, fused_calls):
    plain, layer = layers(dtype, lora_alpha=4)
    for each in (plain, layer):
        for p in each.parameters():
            if p.requires_grad:
                p.data = p.data.float()
    with torch.autocast("cpu", dtype):
        assert same(plain, layer, torch.randn(5, 12, dtype=dtype), rtol=0.05, atol=0.05)
    assert len(fused_calls) == 1
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters() if p.requires_grad)


def dropout() -> tuple[Linear, FusedLinear]:
    return layers(lora_dropout=0.5)


def switched_off() -> tuple[Linear, FusedLinear]:
    made = layers()
    for each in made:
        each.enable_adapters(False)
    return made


def merged() -> tuple[Linear, FusedLinear]:
    made = layers()
    for each in made:
        each.merge()
    return made


def with_a_frozen_start() -> tuple[Linear, FusedLinear]:
    made = layers()
    for each in made:
        generator = torch.Generator().manual_seed(1)
        (layer,) = adapted_layers(each)
        layer.with_start(torch.randn(4, 12, generator=generator), torch.randn(9, 4, generator=generator))
    return made


def with_a_hook() -> tuple[Linear, FusedLinear]:
    made = layers()
    for each in made:
        each.base_layer.register_forward_hook(lambda module, inputs, output: output + 1)
    return made


def with_another_adapter() -> tuple[Linear, FusedLinear]:
    made = layers()
    for each in made:
        torch.manual_seed(2)
        config = LoraConfig(r=2, lora_alpha=2)
        each.update_layer("other", 2, lora_alpha=2, config=config)
        each.set_adapter(["default", "other"])
    return made


@pytest.mark.parametrize(
    "make", [dropout, switched_off, merged, with_a_frozen_start, with_a_hook, with_another_adapter]
)
def test_the_rest_is_left_to_peft(make, fused_calls):
    plain, layer = make()
    x = torch.randn(5, 12)
    torch.manual_seed(3)
    expected = plain(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), expected)
    assert not fused_calls


def test_a_base_that_trains_gets_its_gradient(fused_calls):
    _, layer = layers()
    layer.base_layer.weight.requires_grad_()
    layer(torch.randn(5, 12)).sum().backward()
    assert layer.base_layer.weight.grad is not None
    assert not fused_calls


def test_dropout_is_none_in_evaluation(fused_calls):
    plain, layer = dropout()
    x = torch.randn(5, 12)
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x))
    assert len(fused_calls) == 1


def test_checkpointed_layers_give_the_same_gradients():
    plain, layer = layers()
    x = torch.randn(5, 12)
    expected = results(plain, x)
    got = results(_Checkpointed(layer), x)
    torch.testing.assert_close(list(got.values()), list(expected.values()), **ROUNDING)


class _Checkpointed(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=False)


def test_special_layers_keep_their_own_pass():
    class Special(nn.Linear):
        """Such as a quantised layer."""

    net = inject_adapter_in_model(
        LoraConfig(r=2, target_modules=["0", "1"]), nn.Sequential(Special(4, 4), nn.Conv2d(3, 4, 3))
    )
    before = [type(layer) for layer in net]
    fuse(net)
    assert [type(layer) for layer in net] == before
