"""Adapters in weights and in one another, against dense computations and PEFT."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from dreamlora.lora.merging import added, concatenated, fits
from dreamlora.lora.weights import LayerWeights, lora_weights
from tests.lora.test_low_rank import ADAPTERS, draw


@pytest.mark.parametrize("name", ADAPTERS, ids=str)
def test_it_adds_the_delta(name: str) -> None:
    adapter = ADAPTERS[name]
    delta = adapter.delta()
    weight = draw(*delta.shape, seed=9)
    torch.testing.assert_close(added(weight, [(adapter, 0.5), (adapter, -0.25)]), weight + 0.25 * delta)
    assert fits(adapter, tuple(delta.shape))
    assert not fits(adapter, (delta.shape[0] + 1, *delta.shape[1:]))


def test_bf16_weights_are_added_to_in_float32() -> None:
    adapter = lora_weights(draw(4, 12).bfloat16(), draw(9, 4).bfloat16(), alpha=2.5)
    weight = draw(9, 12, seed=3).bfloat16()
    found = added(weight, [(adapter, 0.7)])
    assert found.dtype == torch.float32
    exact = weight.double() + 0.7 * adapter.in_precision(torch.float64).delta()
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("convolution", [False, True])
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_doras_are_as_peft_has_them(convolution: bool, strength: float) -> None:
    """Also beside a LoRA."""
    torch.manual_seed(0)
    layer: nn.Module = nn.Conv2d(5, 9, 3, bias=False) if convolution else nn.Linear(12, 9, bias=False)
    weight = layer.weight.detach().clone()  # type: ignore[operator, union-attr]
    shown = torch.randn(2, 5, 6, 6) if convolution else torch.randn(2, 12)
    module = get_peft_model(nn.Sequential(layer), config(dora=True), adapter_name="dora")
    module.add_adapter("plain", config(dora=False))
    peft_layer = module.base_model.model[0]
    adapters = []
    for name in ("dora", "plain"):
        A, B = peft_layer.lora_A[name].weight, peft_layer.lora_B[name].weight
        nn.init.normal_(B)
        magnitude = None
        if name == "dora":
            own = peft_layer.lora_magnitude_vector[name].weight
            own.data += torch.rand_like(own)
            magnitude = own.detach().flatten()
        adapters.append((lora_weights(A.detach(), B.detach(), 4.0, magnitude), strength))
        peft_layer.set_scale(name, strength)
    module.base_model.set_adapter(["dora", "plain"])
    with torch.no_grad():
        expected = module.eval()(shown)
        merged = added(weight, adapters)
        found = nn.functional.conv2d(shown, merged) if convolution else nn.functional.linear(shown, merged)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def config(dora: bool) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=4, target_modules=["0"], use_dora=dora)


def test_strength_of_a_dora_is_that_of_its_delta() -> None:
    adapter = lora_weights(draw(4, 12), draw(9, 4), 4.0, draw(9).abs())
    weight = draw(9, 12, seed=3)
    rows = added(weight, [(adapter, 0.3)]).norm(dim=1)
    torch.testing.assert_close(rows, adapter.magnitude)


LINEAR = ["lora", "lora of a negative scale", "loha", "lokr of products"]


def test_concatenation_is_the_sum() -> None:
    adapters = [(ADAPTERS[name], strength) for name, strength in zip(LINEAR, (1.0, -0.5, 2.0, 0.25), strict=True)]
    adapters = [(adapter, strength) for adapter, strength in adapters if adapter.delta().shape == (9, 12)]
    assert len(adapters) == 3
    found = concatenated(adapters)
    assert found.rank == 4 + 4 + 4  # 2 x 2 of the LoHa
    torch.testing.assert_close(found.delta(), sum(strength * adapter.delta() for adapter, strength in adapters))


def test_first_of_them_is_left_as_it_is() -> None:
    """And all are whose scale is one, so that nothing is rounded anew."""
    one = lora_weights(draw(4, 12).bfloat16(), draw(9, 4).bfloat16(), alpha=1.0)
    other = lora_weights(draw(2, 12).bfloat16(), draw(9, 2).bfloat16(), alpha=0.5)
    found = concatenated([(one, 1.0), (other, 1.0)])
    assert torch.equal(found.up, torch.cat([one.up, other.up], dim=1))
    assert (found.scale, found.rank, found.up.dtype) == (0.25, 6, torch.bfloat16)
    assert concatenated([(one, 1.0)]) is one


def test_convolutions_are_joined_whatever_factor_has_their_kernel() -> None:
    names = ("convolution", "convolution with its kernel in B")
    found = concatenated([(ADAPTERS[name], 1.0) for name in names])
    torch.testing.assert_close(found.delta(), sum(ADAPTERS[name].delta() for name in names))


def test_the_higher_precision_counts() -> None:
    one = lora_weights(draw(4, 12).half(), draw(9, 4).half())
    other = lora_weights(draw(4, 12).float(), draw(9, 4).float())
    assert concatenated([(one, 1.0), (other, 1.0)]).up.dtype == torch.float32


def test_what_cannot_be_joined() -> None:
    dora = LayerWeights("lora", ADAPTERS["lora"].tensors, 1.0, draw(9).abs())
    with pytest.raises(ValueError, match="it is a DoRA"):
        concatenated([(ADAPTERS["lora"], 1.0), (dora, 1.0)])
    with pytest.raises(ValueError, match=r"other shapes: \(9, 5, 3, 3\) and \(9, 12\)"):
        concatenated([(ADAPTERS["lora"], 1.0), (ADAPTERS["convolution"], 1.0)])
