"""Frozen weights in fewer bits: what is stored, what is computed with it, and what autograd keeps."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dreamlora import precision
from dreamlora.config import Lora
from dreamlora.errors import UserError
from dreamlora.lora.fused import FusedLinear
from dreamlora.lora.inject import add_lora
from dreamlora.precision import FORMS, QuantizedLinear

CPU = torch.device("cpu")
LARGEST_ERROR = {"bf16": 0.003, "fp8": 0.03, "int8": 0.008, "nf4": 0.1}
"""Of normal weights, relative: half a step of each format, about."""


@pytest.fixture(params=list(FORMS))
def word(request: pytest.FixtureRequest) -> str:
    if request.param == "nf4":
        request.getfixturevalue("bitsandbytes")
    return str(request.param)


def a_layer(dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(96, 160, bias=bias, dtype=dtype).requires_grad_(False)


def apart(first: Tensor, second: Tensor) -> float:
    return float((first.double() - second.double()).norm() / second.double().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stored_weight_is_as_close_as_its_format_can_be(word: str, dtype: torch.dtype) -> None:
    plain = a_layer(dtype)
    stored = QuantizedLinear(copy.deepcopy(plain), word)
    assert stored.weight.dtype == dtype
    assert 0 < apart(stored.weight, plain.weight) + (word == "bf16") < LARGEST_ERROR[word] + (word == "bf16")
    held = sum(buffer.numel() * buffer.element_size() for buffer in stored.buffers())
    assert held == precision.quantized_bytes(plain, word)
    assert "weight" not in dict(stored.named_parameters())


def test_int8_is_no_worse_than_one_step_of_each_row() -> None:
    plain = a_layer()
    error = (QuantizedLinear(plain, "int8").weight - plain.weight).abs()
    step = plain.weight.abs().amax(1, keepdim=True) / 127
    assert (error <= step / 2 * (1 + 1e-5)).all()


def test_fp8_rounds_as_torch_does_after_scaling_each_row_to_the_largest_number() -> None:
    plain = a_layer()
    scale = plain.weight.abs().amax(1, keepdim=True) / 448
    expected = (plain.weight / scale).to(torch.float8_e4m3fn).float() * scale
    assert torch.equal(QuantizedLinear(plain, "fp8").weight, expected)


def test_nf4_is_what_bitsandbytes_layer_holds(bitsandbytes) -> None:
    plain = a_layer()
    theirs = bitsandbytes.nn.Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4").to("cpu")
    expected = bitsandbytes.functional.dequantize_4bit(theirs.data, theirs.quant_state)
    assert torch.equal(QuantizedLinear(plain, "nf4").weight, expected)


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_computes_with_its_unpacked_weight_and_so_do_its_gradients(word: str, bias: bool) -> None:
    stored = QuantizedLinear(a_layer(bias=bias), word)
    x = torch.randn(2, 3, 96, requires_grad=True)
    y = stored(x)
    torch.testing.assert_close(y, nn.functional.linear(x, stored.weight, stored.bias), rtol=0, atol=0)
    [gradient] = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(gradient, 2 * y.detach() @ stored.weight)


def test_no_unpacked_weight_is_kept_for_the_backward_pass(word: str) -> None:
    stored = QuantizedLinear(a_layer(), word)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        stored(torch.randn(2, 3, 96, requires_grad=True))
    assert max(kept, default=0) < stored.weight.numel()


def test_compiled_it_computes_the_same_in_one_piece_and_keeps_no_unpacked_weight(word: str) -> None:
    stored = QuantizedLinear(a_layer(), word)
    x = torch.randn(2, 3, 96, requires_grad=True)
    compiled = torch.compile(stored, backend="aot_eager", fullgraph=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel() * t.itemsize) or t, lambda t: t):
        y = compiled(x)
    assert max(kept) <= precision.quantized_bytes(a_layer(), word)
    torch.testing.assert_close(y, stored(x))
    [gradient], [expected] = (torch.autograd.grad(each.square().sum(), x) for each in (y, stored(x)))
    torch.testing.assert_close(gradient, expected)


def test_under_autocast_it_computes_in_that_precision(word: str) -> None:
    stored = QuantizedLinear(a_layer(torch.bfloat16), word)
    with torch.autocast("cpu", torch.bfloat16):
        assert stored(torch.randn(4, 96)).dtype == torch.bfloat16


def test_it_cannot_be_turned_into_another_type(word: str) -> None:
    with pytest.raises(TypeError, match=word):
        QuantizedLinear(a_layer(), word).half()


def test_its_state_has_a_weight_of_the_size_that_diffusers_looks_up(word: str) -> None:
    plain = a_layer()
    found = QuantizedLinear(plain, word).state_dict()["weight"]
    assert found.is_meta and found.shape == plain.weight.shape


class Block(nn.Module):
    """A projection outside of the blocks, and a block."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_in = nn.Linear(64, 64)
        self.blocks = nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(64, 64), "norm": nn.LayerNorm(64)})])


def test_only_linear_layers_in_blocks_are_stored_so(word: str) -> None:
    module = Block().requires_grad_(False).eval()
    precision.quantize(module, word, CPU)
    assert type(module.proj_in) is nn.Linear
    assert type(module.blocks[0]["to_q"]) is QuantizedLinear
    assert not module.blocks[0]["to_q"].training


def test_a_lora_on_it_takes_the_fused_pass_and_trains(word: str) -> None:
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    model.requires_grad_(False)
    precision.quantize(model, word, CPU)
    add_lora(model, Lora(rank=4), ("to_q", "ff.net.2"))
    layers = [layer for layer in model.modules() if isinstance(layer, FusedLinear)]
    assert layers and all(type(layer.base_layer) is QuantizedLinear for layer in layers)
    layer = layers[0]
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(3, layer.in_features, requires_grad=True)
    fused = layer(x)
    plain = super(FusedLinear, layer).forward(x)
    torch.testing.assert_close(fused, plain)
    wanted = [x, layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    for one, other in zip(
        torch.autograd.grad(fused.square().sum(), wanted),
        torch.autograd.grad(plain.square().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_what_is_missing_is_named_with_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dreamlora.config.model.check_installed", _missing)
    with pytest.raises(UserError, match=r"--base_precision nf4: .*pip install"):
        precision.require("base_precision", "nf4", "cuda")
    with pytest.raises(UserError, match=r"--base_precision fp8 cannot be computed on mps: give bf16 or int8"):
        precision.require("base_precision", "fp8", "mps")
    with pytest.raises(UserError, match=r"--base_precision int3: there are bf16, fp8, int8, nf4"):
        precision.require("base_precision", "int3", "cuda")
    precision.require("base_precision", None, "cuda")


def _missing(packages: tuple[str, ...], extra: str) -> str:
    raise UserError(f'pip install "dreamlora[{extra}]"')
