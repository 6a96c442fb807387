"""What ``accelerate launch`` may ask for: all that cannot work is refused by name, before anything is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.utils import DistributedType

from dreamlora.commands.evaluate.command import main as evaluate
from dreamlora.config import Model, RunConfig, Train
from dreamlora.errors import UserError
from dreamlora.run import assemble, launch, opening


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], str]:
    """The message that a program ends with; it is not to look for a model before."""

    def looked(*_: Any) -> None:
        raise AssertionError("it went on to the model")

    monkeypatch.setattr(opening, "resolve_source", looked)
    monkeypatch.setattr("dreamlora.commands.trained.resolve_source", looked)

    def message(program: Callable[[], Any]) -> str:
        with pytest.raises(UserError) as error:
            program()
        return str(error.value)

    return message


def trained() -> Any:
    assemble.train(RunConfig(), None)


@pytest.fixture
def evaluated(sd_folder: Path, tmp_path: Path) -> Callable[[], None]:
    """Evaluation of a file that it would not read so soon."""
    file = tmp_path / "lora.safetensors"
    file.touch()
    return lambda: evaluate([str(file), "--prompts", "a", "--pretrained_model_name_or_path", str(sd_folder)])


@pytest.mark.parametrize(
    ("variable", "name", "flag"),
    [
        ("ACCELERATE_USE_FSDP", "FSDP", "--use_fsdp"),
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed", "--use_deepspeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM", "--use_megatron_lm"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "tensor or context parallelism", "--use_parallelism_config"),
    ],
)
def test_a_launch_that_shares_out_the_model_is_refused(
    variable: str,
    name: str,
    flag: str,
    refused: Callable[..., str],
    evaluated: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(variable, "true")
    for program in (trained, evaluated):
        message = refused(program)
        assert message.startswith(f"{name} is not supported ({variable} is set, by accelerate launch {flag} ")
        assert "accelerate launch --multi_gpu" in message


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "accelerate's dynamo_backend is inductor, which would compile"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "mixed_precision is fp8, which is not supported: give --mixed_precision"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "--gradient_accumulation_steps is 1: give --gradient_accumula"),
    ],
)
def test_settings_that_training_would_pass_over_or_break_at_are_refused(
    variable: str, value: str, words: str, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    assert words in refused(trained)


@pytest.mark.parametrize(
    ("variable", "value", "config"),
    [
        ("ACCELERATE_USE_FSDP", "false", RunConfig()),
        ("ACCELERATE_USE_DEEPSPEED", "", RunConfig()),
        ("ACCELERATE_DYNAMO_BACKEND", "NO", RunConfig()),
        ("ACCELERATE_MIXED_PRECISION", "bf16", RunConfig()),
        ("ACCELERATE_MIXED_PRECISION", "fp8", RunConfig(model=Model(mixed_precision="no"))),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", RunConfig(train=Train(gradient_accumulation_steps=4))),
    ],
)
def test_the_same_variables_may_say_what_works(
    variable: str, value: str, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv(variable, value)
    wanted = config.model.mixed_precision or ("bf16" if value == "bf16" else "no")
    assert launch.accelerator_of(config).mixed_precision == wanted


@pytest.mark.parametrize("kind", DistributedType)
def test_every_kind_of_launch_is_known_to_work_or_refused_by_name(
    kind: DistributedType, refused: Callable[..., str], evaluated: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = SimpleNamespace(distributed_type=kind)
    monkeypatch.setattr(launch, "Accelerator", lambda **_: state)
    monkeypatch.setattr(launch, "PartialState", lambda **_: state)
    if kind in ("NO", "MULTI_CPU", "MULTI_GPU"):
        assert launch.accelerator_of(RunConfig()) is launch.processes() is state
        return
    for program in (trained, evaluated):
        assert refused(program).startswith(f"accelerate runs this as {kind.value}, which is not known to work")
