"""Kinds of adapters, starts and optimizers that do not go together are refused by name."""

from __future__ import annotations

import pytest

from dreamlora import registry
from dreamlora.cli.parse import parse_run
from dreamlora.config.adapting import check_adapter
from dreamlora.errors import UserError

IN_PAIRS = ["lora_muon", "lora_plus", "lora_rite", "lora_tsd", "muon", "peft_riemannian", "scaled_adamw", "scaled_gd"]


def check(flags: str) -> None:
    check_adapter(parse_run(flags.split())[0])


@pytest.mark.parametrize("adapter", registry.names("adapters"))
@pytest.mark.parametrize("optimizer", registry.names("optimizers"))
def test_optimizers_of_pairs_are_for_adapters_with_pairs(
    adapter: str, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "check_needs", lambda kind, name: None)
    flags = f"--adapter {adapter} --optimizer {optimizer}"
    if optimizer not in IN_PAIRS or registry.load("adapters", adapter).PAIRS:
        check(flags)
        return
    with pytest.raises(
        UserError, match=rf"--optimizer {optimizer} .*--adapter {adapter} has no pair.* adamw, "
    ) as told:
        check(flags)
    assert optimizer not in str(told.value).partition("one of the optimizers")[2].split(", ")


@pytest.mark.parametrize("init", registry.names("inits"))
def test_starts_away_from_zero_are_for_lora_alone(init: str) -> None:
    check(f"--init {init}")
    away = registry.load("inits", init).OFFSET
    for adapter in ("dora", "loha", "lokr"):
        if adapter == "dora" and not away:
            check(f"--init {init} --adapter {adapter}")
        elif init != "gaussian":
            with pytest.raises(UserError, match=rf"--init {init} .*--adapter {adapter}"):
                check(f"--init {init} --adapter {adapter}")


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ("--adapter loha --use_rslora", "--use_rslora is for LoRA and DoRA, and --adapter loha"),
        ("--adapter loha --lora_units start", "--lora_units start is about A and B, and --adapter loha has no pair"),
        ("--adapter lokr --training_adapter x/y", "--training_adapter is a LoRA, .*--adapter lokr"),
        ("--adapter lokr --lora_dropout 0.1", "--lora_dropout .*--adapter_args rank_dropout 0.1 or module_dropout 0.1"),
        (
            "--init orthogonal --rank 4 --rank_pattern ff 3",
            "--init orthogonal needs a --rank_pattern that is a multiple",
        ),
        (
            "--init orthogonal --train_text_encoder --text_encoder_rank 3",
            "--init orthogonal needs a --text_encoder_rank that is a multiple of 2",
        ),
        ("--text_encoder_rank 3 --no_train_text_encoder", "--text_encoder_rank is only used together"),
        (
            "--adapter lycoris",
            "--adapter: unknown name 'lycoris' among the adapters: choose one of dora, loha, lokr, lora",
        ),
    ],
)
def test_what_does_not_go_together(flags: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        check(flags)
