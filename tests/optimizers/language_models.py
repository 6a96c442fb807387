"""Small language models with PEFT's LoRA, for the optimizer tests; as anyone would write them, without this program."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dreamlora import optimizers
from dreamlora.optimizers import LoraPairOptimizer, lora_param_groups

VOCABULARY = 50
CLASSES = [
    cls
    for cls in (getattr(optimizers, name) for name in optimizers.__all__)
    if isinstance(cls, type) and issubclass(cls, LoraPairOptimizer) and cls is not LoraPairOptimizer
]
RATES = {"ScaledGD": 0.2, "LoRAMuon": 0.1, "LoRATSD": 0.1}
"""At which a class learns in a few steps; others do with 1e-2."""
TOKENS = torch.randint(VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(1))


def gpt2(layers: int = 2, **lora: Any) -> PeftModel:
    """Its layers are transformers' Conv1D, whose weight is ``(in, out)``."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=32,
        n_layer=layers,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(0)
    return with_lora(GPT2LMHeadModel(config), **{"fan_in_fan_out": True, **lora})


def llama(dtype: torch.dtype = torch.float32, **lora: Any) -> PeftModel:
    """With grouped queries, so that key and value are narrower than the query."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    return with_lora(LlamaForCausalLM(config).to(dtype), **lora)


def with_lora(model: Any, **lora: Any) -> PeftModel:
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **lora}))


def optimizer_of(cls: type[LoraPairOptimizer], model: Any, **options: Any) -> LoraPairOptimizer:
    return cls(lora_param_groups(model, fallback_lr=1e-2), lr=RATES.get(cls.__name__, 1e-2), **options)


def loss_of(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    return model(input_ids=tokens, labels=tokens).loss


def step(model: Any, optimizer: Any, tokens: Tensor = TOKENS) -> float:
    """The loss before a step on it."""
    optimizer.zero_grad()
    loss = loss_of(model, tokens)
    loss.backward()
    optimizer.step()
    return loss.item()


def trained(model: Any) -> dict[str, Tensor]:
    """Copies of what trains, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_same(one: Any, other: Any) -> None:
    """Two models hold the same to the last bit."""
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Two models hold the same up to rounding."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert (value - other[name]).abs().max() <= tolerance, name
