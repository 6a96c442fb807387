"""The optimizers in projects that are not this one: language models with PEFT, and what people train them with."""

from __future__ import annotations

import copy
import io
import pickle
import re
import textwrap
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from dreamlora import registry
from dreamlora.errors import UserError
from dreamlora.optimizers import ScaledAdamW, check_compatibility, find_lora_pairs, lora_param_groups
from tests.optimizers.language_models import (
    CLASSES,
    RATES,
    TOKENS,
    assert_close,
    assert_same,
    gpt2,
    llama,
    loss_of,
    optimizer_of,
    step,
    trained,
)

every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)

MODELS = {  # what makes the model, how many pairs it has, and how many other tensors train
    "gpt2": (gpt2, 8, 0),
    "llama": (llama, 14, 0),
    "embeddings": (lambda: gpt2(target_modules=["wte", "c_attn"]), 3, 0),
    "tied embeddings": (lambda: gpt2(target_modules=["wte", "lm_head", "c_attn"], ensure_weight_tying=True), 4, 0),
    "modules_to_save": (lambda: gpt2(target_modules=["c_attn"], modules_to_save=["lm_head"]), 2, 1),
    "new tokens": (lambda: gpt2(target_modules=["c_attn"], trainable_token_indices=[1, 2]), 2, 1),
    "DoRA": (lambda: llama(use_dora=True), 14, 14),
    "rsLoRA": (lambda: llama(use_rslora=True), 14, 0),
    "bias": (lambda: llama(lora_bias=True), 14, 14),
    "several ranks": (lambda: llama(rank_pattern={"q_proj": 3}, alpha_pattern={"v_proj": 1}), 14, 0),
    "bf16 model": (lambda: llama(torch.bfloat16), 14, 0),
    "bf16 LoRA": (lambda: llama(torch.bfloat16).bfloat16(), 14, 0),
}


every_model = pytest.mark.parametrize("kind", MODELS)


@every_model
def test_what_is_found_in_language_models_are_pairs_and_all_of_them(kind):
    make, pairs, others = MODELS[kind]
    model = make()
    groups = lora_param_groups(model)
    assert [len(group["params"]) for group in groups] == [2 * pairs] + [others] * (others > 0)
    assert sum(len(group["params"]) for group in groups) == len(trained(model))
    step(model, ScaledAdamW(groups, lr=1e-2))  # B is no longer zero
    model.zero_grad()
    loss_of(model).backward()
    errors = check_compatibility(model)
    assert len(errors) == pairs and 0 < max(errors.values()) < (1e-2 if kind == "bf16 LoRA" else 1e-5)


@every_class
@every_model
def test_language_models_learn_and_go_on_to_the_bit(kind, cls):
    make = MODELS[kind][0]
    model = make()
    optimizer = optimizer_of(cls, model)
    before = trained(model)
    losses = [step(model, optimizer) for _ in range(4)]
    state, weights = io.BytesIO(), copy.deepcopy(model.state_dict())
    torch.save(optimizer.state_dict(), state)
    losses += [step(model, optimizer) for _ in range(4)]
    assert losses[-1] < losses[0] - 0.05
    assert not [name for name, p in trained(model).items() if torch.equal(p, before[name])]

    other = make()
    other.load_state_dict(weights)
    resumed = optimizer_of(cls, other)
    state.seek(0)
    resumed.load_state_dict(torch.load(state, weights_only=True))
    assert [step(other, resumed) for _ in range(4)] == losses[4:]
    assert_same(model, other)


@pytest.mark.parametrize("name", registry.names("optimizers"))
def test_every_plug_in_trains_a_language_model(name):
    try:
        registry.check_needs("optimizers", name)
    except UserError as error:
        pytest.skip(str(error))
    plugin = registry.load("optimizers", name)
    model = gpt2(layers=1)
    rates = {"lora_muon": 0.1, "lora_tsd": 0.1, "prodigy": 1.0, "sgd": 1.0, "adafactor": 1.0, "scaled_gd": 0.2}
    optimizer = plugin.build(
        lora_param_groups(model, lr=rates.get(name, 1e-2)),
        plugin.Options(**({"d0": 1e-2} if name == "prodigy" else {})),
    )
    losses = [step(model, optimizer) for _ in range(6)]
    assert losses[-1] < losses[0] - 0.02


SCHEDULES = {
    "one cycle": lambda optimizer, lr: lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=6),
    "cyclic": lambda optimizer, lr: lr_scheduler.CyclicLR(optimizer, lr / 10, lr, 2),
    "warm-up, then cosine": lambda optimizer, lr: lr_scheduler.SequentialLR(
        optimizer,
        [lr_scheduler.LinearLR(optimizer, total_iters=2), lr_scheduler.CosineAnnealingLR(optimizer, 4)],
        milestones=[2],
    ),
}


@every_class
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_of_torch_go_on_to_the_bit(schedule, cls):
    rate = RATES.get(cls.__name__, 1e-2)
    models = [gpt2(layers=1) for _ in range(2)]
    optimizers = [optimizer_of(cls, model) for model in models]
    schedules = [SCHEDULES[schedule](optimizer, rate) for optimizer in optimizers]

    def train(which: int, steps: int) -> list[float]:
        rates = []
        for _ in range(steps):
            rates.append(optimizers[which].param_groups[0]["lr"])
            step(models[which], optimizers[which])
            schedules[which].step()
        return rates

    before = train(0, 3)
    for part in (models, optimizers, schedules):
        part[1].load_state_dict(copy.deepcopy(part[0].state_dict()))
    after = train(0, 2)
    assert train(1, 2) == after and len({*before, *after}) > 2
    assert_same(*models)


@every_class
def test_a_schedule_that_looks_at_the_loss(cls):
    model = gpt2(layers=1)
    optimizer = optimizer_of(cls, model)
    before = optimizer.param_groups[0]["lr"]
    schedule = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    for _ in range(2):
        step(model, optimizer)
        schedule.step(1.0)
    assert optimizer.param_groups[0]["lr"] == before / 2


@every_class
def test_accumulated_gradients_are_those_of_the_whole_batch(cls):
    whole, parts = gpt2(), gpt2()
    first, second = optimizer_of(cls, whole), optimizer_of(cls, parts)
    for _ in range(3):
        step(whole, first)
        second.zero_grad()
        for tokens in TOKENS.split(2):
            (loss_of(parts, tokens) / 2).backward()
        second.step()
    assert_close(trained(whole), trained(parts))


@every_class
def test_a_gradient_scaler_leaves_out_a_step_with_infinite_gradients(cls):
    scaled, plain = gpt2(layers=1), gpt2(layers=1)
    optimizer, other = optimizer_of(cls, scaled), optimizer_of(cls, plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for number in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(scaled)).backward()
        before, state = trained(scaled), pickle.dumps(optimizer.state_dict())
        if number == 2:
            optimizer.param_groups[0]["params"][0].grad[0, 0] = torch.inf
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if number == 2:
            assert all(torch.equal(p, before[name]) for name, p in trained(scaled).items())
            assert pickle.dumps(optimizer.state_dict()) == state and scaler.get_scale() == 2.0**9
        else:
            step(plain, other)
    assert_close(trained(scaled), trained(plain), 1e-6)


@every_class
def test_autocast_and_checkpointing(cls):
    plain, checkpointed, half = gpt2(), gpt2(), gpt2()
    checkpointed.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizers = [optimizer_of(cls, model) for model in (plain, checkpointed, half)]
    for _ in range(3):
        step(plain.train(), optimizers[0])
        step(checkpointed, optimizers[1])
        with torch.autocast("cpu", torch.bfloat16):  # the step inside of it, too
            last = step(half, optimizers[2])
    assert_same(plain, checkpointed)
    assert last < loss_of(gpt2()).item() - 0.05
    assert {p.dtype for p in trained(half).values()} == {torch.float32}


@every_class
def test_several_adapters_train_together_or_alone(cls):
    model = gpt2()
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True))
    model.base_model.set_adapter(["default", "second"])
    both = optimizer_of(cls, model)
    assert [len(group["params"]) for group in both.param_groups] == [2 * (8 + 2)]
    before = trained(model)
    for _ in range(2):
        step(model, both)
    assert not [name for name, p in trained(model).items() if torch.equal(p, before[name])]

    model.set_adapter("second")  # which freezes the other
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".default." in name}
    optimizer = optimizer_of(cls, model)
    assert optimizer.param_groups[0]["pair_names"] == [
        f"base_model.model.transformer.h.{layer}.attn.c_attn[second]" for layer in range(2)
    ]
    losses = [step(model, optimizer) for _ in range(4)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in before.items())


@every_class
def test_an_adapter_without_a_part_in_the_loss_stays_as_it_is(cls):
    model = gpt2(layers=1)
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True))
    model.base_model.set_adapter(["default", "second"])
    optimizer = optimizer_of(cls, model, weight_decay=0.1)
    model.base_model.set_adapter(["default"])
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    before = {name: p for name, p in trained(model).items() if ".second." in name}
    for _ in range(2):
        step(model, optimizer)
    assert before and all(torch.equal(p, model.get_parameter(name)) for name, p in before.items())


@every_class
def test_a_copied_and_a_pickled_optimizer_go_on_with_their_models(cls):
    model = gpt2(layers=1)
    optimizer = optimizer_of(cls, model)
    step(model, optimizer)
    others = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    for one, of_it in ((model, optimizer), *others):
        step(one, of_it)
        step(one, of_it)
    for other, _ in others:
        assert_same(model, other)


@every_class
def test_states_of_a_distributed_checkpoint(cls):
    state_dict = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    model, other = gpt2(layers=1), gpt2(layers=1)
    optimizer, fresh = optimizer_of(cls, model), optimizer_of(cls, other)
    step(model, optimizer)
    weights, states = copy.deepcopy(state_dict.get_state_dict(model, optimizer))
    state_dict.set_state_dict(other, fresh, model_state_dict=weights, optim_state_dict=states)
    step(model, optimizer)
    step(other, fresh)
    assert_same(model, other)


def test_a_compiled_model_has_the_same_pairs_and_states():
    torch._dynamo.reset()
    plain = peft.inject_adapter_in_model(
        peft.LoraConfig(target_modules=["0"]), nn.Sequential(nn.Linear(6, 4), nn.Tanh())
    )
    inner = copy.deepcopy(plain)
    model = torch.compile(inner, backend="eager")
    optimizers = [optimizer_of(ScaledAdamW, each) for each in (plain, model)]
    assert len(find_lora_pairs(model)) == len(find_lora_pairs(plain)) == 1
    for _ in range(2):
        for each, optimizer in zip((plain, model), optimizers, strict=True):
            optimizer.zero_grad()
            each(torch.ones(2, 6)).square().sum().backward()
            optimizer.step()
    assert_close(trained(plain), trained(inner))
    optimizers[0].load_state_dict(optimizers[1].state_dict())
    optimizers[1].load_state_dict(optimizers[0].state_dict())


def test_the_examples_in_the_documents_run():
    text = (Path(__file__).parents[2] / "docs" / "elsewhere.md").read_text(encoding="utf-8")
    blocks = [textwrap.dedent(block) for block in re.findall(r"\n\n((?: {4}.*\n|\n)+)", text)]
    example, by_name, average = blocks
    assert len(example.split("from dreamlora")[1].splitlines()) < 16
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(example, names)
    assert names["loss"].item() < 3.7  # of 50 tokens, of which nothing is known, it is 3.9
    exec(by_name, names)
    assert type(names["optimizer"]) is torch.optim.AdamW and "all_reduce(p.grad)" in average
