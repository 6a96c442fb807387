"""``--vram``: what it chooses, by numbers alone; and that a training has it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from dreamlora.cli.parse import parse_run
from dreamlora.errors import UserError
from dreamlora.memory import Shortage
from dreamlora.models import compiling
from dreamlora.precision import QuantizedLinear
from dreamlora.run import opening, remedies, vram
from dreamlora.run.vram import Means
from tests import real_sizes

PLAIN = {
    "gradient_checkpointing": False,
    "base_precision": None,
    "offload_blocks": 0,
    "train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "text_encoder_precision": None,
    "text_encoder_device": None,
}
MEANS = Means(offloaded=40, words=("int8", "nf4"), text_words=("int8",))
SIZES = {None: 100, "bf16": 100, "fp8": 50, "int8": 50, "nf4": 25}


def needed(options: Mapping[str, Any], start: Mapping[str, Any] = PLAIN) -> int:
    """Of a model of 50 blocks and 100 bytes: 20 for a sample, 2 with checkpointing."""
    now = {**start, **options}
    weights = SIZES[now["base_precision"]] * (50 - now["offload_blocks"]) // 50
    return weights + now["train_batch_size"] * (2 if now["gradient_checkpointing"] else 20)


CHECKPOINTED = {"gradient_checkpointing": True}
ALONE = {"train_batch_size": 1, "gradient_accumulation_steps": 4}
CHOICES = [
    (180, {}),
    (179, CHECKPOINTED),
    (107, {**CHECKPOINTED, "train_batch_size": 2, "gradient_accumulation_steps": 2}),
    (102, {**CHECKPOINTED, **ALONE}),
    (101, {**CHECKPOINTED, "base_precision": "int8"}),
    (52, {**CHECKPOINTED, "base_precision": "int8", **ALONE}),
    (51, {**CHECKPOINTED, "base_precision": "int8", "offload_blocks": 10}),
    (12, {**CHECKPOINTED, "base_precision": "int8", "offload_blocks": 40, **ALONE}),
    (7, {**CHECKPOINTED, "base_precision": "nf4", "offload_blocks": 40, **ALONE}),
]


@pytest.mark.parametrize(("room", "chosen"), CHOICES)
def test_what_costs_least_quality_is_tried_first(room: int, chosen: dict[str, Any]) -> None:
    assert vram.first_that_fits(vram.base_options(PLAIN, (), MEANS), needed, room) == chosen
    assert needed(chosen) <= room


def test_what_comes_closest_is_told_where_nothing_fits() -> None:
    least = vram.first_that_fits(vram.base_options(PLAIN, (), MEANS), needed, 1)
    assert needed(least) == min(map(needed, vram.base_options(PLAIN, (), MEANS)))


@pytest.mark.parametrize("flag", [flag for flag in PLAIN if not flag.startswith("text")])
def test_given_flags_stay(flag: str) -> None:
    given = {"base_precision": "fp8", "train_batch_size": 4, "offload_blocks": 8, "gradient_accumulation_steps": 1}
    start = {**PLAIN, "gradient_checkpointing": flag == "offload_blocks", flag: given.get(flag, False)}
    candidates = list(vram.base_options(start, {flag}, MEANS))
    assert len(candidates) > 1 and not any(flag in options for options in candidates)
    products = {
        {**start, **each}["train_batch_size"] * {**start, **each}["gradient_accumulation_steps"] for each in candidates
    }
    assert products == {4}


def test_nothing_waits_without_checkpointing() -> None:
    candidates = vram.base_options(PLAIN, {"gradient_checkpointing"}, MEANS)
    assert not any(options.get("offload_blocks") for options in candidates)


def test_no_fewer_blocks_wait_than_the_ring_holds_or_were_asked_for() -> None:
    few = Means(offloaded=4, words=MEANS.words)
    assert {options.get("offload_blocks", 0) for options in vram.base_options(PLAIN, (), few)} == {0, 3, 4}
    start = {**PLAIN, **CHECKPOINTED, "offload_blocks": 20}
    assert {{**start, **each}["offload_blocks"] for each in vram.base_options(start, (), MEANS)} == {20, 30, 40}


def test_text_encoders_are_rounded_before_they_are_slow() -> None:
    assert list(vram.text_options(PLAIN, (), MEANS)) == [
        {},
        {"text_encoder_precision": "int8"},
        {"text_encoder_device": "cpu"},
    ]
    assert list(vram.text_options(PLAIN, {"text_encoder_precision", "text_encoder_device"}, MEANS)) == [{}]
    assert {"text_encoder_device": "cpu"} not in vram.text_options(PLAIN, (), Means(text_on_cpu=False))


@pytest.mark.parametrize("wrong", ["3.9", "0", "-8", "nan", "inf", "8GB", "all", ""])
def test_no_amount_of_memory(wrong: str) -> None:
    with pytest.raises(UserError, match="--vram must be gigabytes, 4 or more, such as 12, or auto"):
        parse_run(["--vram", wrong])


def test_words_are_flags() -> None:
    assert vram.in_words({**CHECKPOINTED, **ALONE}) == (
        "--gradient_checkpointing --train_batch_size 1 --gradient_accumulation_steps 4"
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return real_sizes.wide(tmp_path_factory.mktemp("models") / "flux")


@pytest.fixture
def begun(model: Path, tmp_path: Path, monkeypatch) -> Callable[..., Any]:
    """A run that has begun with --vram, of which so many bytes are left for it."""

    def begin(room: int, *more: str, precision: str | None = "no", vram: str | None = "8") -> Any:
        monkeypatch.setattr("dreamlora.run.vram.room_of", lambda total: room)
        AcceleratorState._reset_state(reset_partial_state=True)
        flags = f"--pretrained_model_name_or_path {model} --instance_data_dir {model} --max_train_steps 2"
        flags += f" --resolution 32 --max_sequence_length 32 --latents_cache_dir {tmp_path / 'cache'}"
        flags += f" --vram {vram}" if vram else ""
        flags += f" --mixed_precision {precision}" if precision else ""
        return opening.begin(parse_run([*flags.split(), *more])[0])

    return begin


def test_a_run_has_what_was_chosen(begun, caplog) -> None:
    with caplog.at_level("INFO", "dreamlora"):
        context = begun(30 * 2**20, "--train_batch_size", "2")
    assert context.chosen == {"gradient_checkpointing": True, "base_precision": "int8"}
    assert context.config.model.base_precision == context.source.base_precision == "int8"
    assert context.config.model.gradient_checkpointing and context.parts.source is context.source
    assert any(isinstance(layer, QuantizedLinear) for layer in context.parts.get("denoiser")["transformer"].modules())
    assert "--vram 8 chooses: --gradient_checkpointing --base_precision int8. Estimated for the 30 MiB" in caplog.text
    assert context.config.train.train_batch_size == 2


def test_what_the_chosen_model_holds_is_told_where_memory_is_short(begun) -> None:
    context = begun(30 * 2**20)
    context.parts.get("denoiser")
    context.memory.note(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert context.memory.shortage.held["denoiser"] > 0


def test_roomy_runs_are_left_alone(begun) -> None:
    context = begun(2**40)
    assert context.chosen == {} and context.source.base_precision is None


def test_flags_that_were_given_win(begun) -> None:
    flags = ["--base_precision", "fp8", "--no_gradient_checkpointing", "--gradient_accumulation_steps", "3"]
    with pytest.raises(
        UserError, match=r"--vram 8: this does not fit.* leave out --base_precision and --grad"
    ) as error:
        begun(2**20, *flags)
    assert "with --text_encoder_precision int8" not in str(error.value) and "nf4" not in str(error.value)
    assert "a smaller --resolution (now 32) or --rank (now 4)" in str(error.value)


def test_blocks_do_not_wait_in_compiled_code(begun, monkeypatch) -> None:
    """Not even in an advice: nobody who gave --compile alone is told that it cannot be combined with that."""
    monkeypatch.setattr(compiling, "require_compiler", lambda device: None)
    with pytest.raises(UserError, match=r"--vram 8: this does not fit.*leave out --compile") as error:
        begun(2**20, "--compile")
    assert "--base_precision" in str(error.value) and "--offload_blocks" not in str(error.value)
    context = begun(2**40, "--compile")
    assert "offload" not in (vram.flags_that_fit(context, 0) or "")
    short = Shortage("training", on_host=False, total=8 * 2**30)
    monkeypatch.setattr(context.accelerator.state, "device", torch.device("cuda"))
    assert "--offload_blocks N with --gradient_checkpointing (N blocks" in remedies.of_run(context, short)


def test_a_cpu_does_not_tell_what_it_has_free(begun) -> None:
    with pytest.raises(UserError, match=r"--vram auto: cpu does not tell .* such as --vram 8"):
        begun(2**40, "--vram", "auto")


def test_a_resumed_run_has_the_precision_that_it_had(begun, tmp_path: Path) -> None:
    """On a roomier GPU too: other weights would be another run."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("base_precision: int8\ntext_encoder_precision: null\n", encoding="utf-8")
    where = ["--output_dir", str(run), "--resume_from_checkpoint", "latest"]
    context = begun(2**40, *where)
    assert context.chosen == {"base_precision": "int8"}
    assert context.config.model.base_precision == context.source.base_precision == "int8"
    assert not context.config.model.gradient_checkpointing, "there is room for its numbers, which are the same"
    assert begun(2**40, *where, "--base_precision", "fp8").config.model.base_precision == "fp8"


def test_flags_are_advised_that_take_less_than_what_is_set(begun) -> None:
    context = begun(2**40)
    advice = vram.flags_that_fit(context, 0)
    assert advice and advice.startswith("--gradient_checkpointing")
    set_already = begun(2**40, "--gradient_checkpointing", "--base_precision", "int8")
    advice = vram.flags_that_fit(set_already, 0)
    assert advice and "--gradient_checkpointing" not in advice and "--base_precision" not in advice


def test_where_memory_was_short_the_flags_that_fit_are_told(begun) -> None:
    context = begun(2**40)
    told = remedies.of_run(context, Shortage("training", on_host=False, total=8 * 2**30))
    assert f"it fits with {vram.flags_that_fit(context, 8 * 2**30)}" in told
    assert "it fits with" not in remedies.of_run(context, Shortage("training", on_host=True, total=8 * 2**30))
    assert "it fits with" not in remedies.of_run(context, Shortage("training", on_host=False))


def test_no_advice_where_nothing_would_fit(begun, monkeypatch) -> None:
    context = begun(2**40)
    monkeypatch.setattr(vram, "room_of", lambda total: 2**10)
    assert vram.flags_that_fit(context, 8 * 2**30) is None


@pytest.mark.parametrize("name", ["qwen_image-edit", "flux-kontext"])
def test_models_that_edit_are_estimated_too(name: str, begun, tiny_folder) -> None:
    """Roughly, where prompts cannot be gone through, as the text encoder sees images with them."""
    folder = tiny_folder(name)
    context = begun(2**40, "--pretrained_model_name_or_path", str(folder), "--conditioning_data_dir", str(folder))
    stages = {stage.name: stage for stage in vram.rehearsal_of(context).stages()}
    assert stages["training"].work and stages["drawing samples"].work
    remedies.of_run(context, Shortage("training", on_host=False, total=8 * 2**30))


def test_the_precision_of_the_run_is_chosen_too_and_told(begun, caplog) -> None:
    """Whoever goes on without --vram, by the flags that it told of, has the same."""
    flags = ["--mixed_precision", "bf16"]
    with caplog.at_level("INFO", "dreamlora"):
        begun(2**40, *flags)
    assert "--vram 8 chooses: no other options than were given" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO", "dreamlora"):
        context = begun(2**40, precision=None)
    assert "--vram 8 chooses: --mixed_precision bf16. Estimated" in caplog.text
    rows = list(vram.table(context, vram.rehearsal_of(context)))
    assert [row["flags"] for row in rows] == ["--mixed_precision bf16"]
    context = begun(2**40, precision=None, vram=None)
    rows = list(vram.table(context, vram.rehearsal_of(context)))
    assert {row["flags"] for row in rows} == {"--mixed_precision bf16"}


def test_a_resumed_run_computes_as_it_did(begun, tmp_path: Path) -> None:
    """In bf16 it would be another run, which nobody has asked for who gives --vram since memory was short."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("mixed_precision: 'no'\n", encoding="utf-8")
    where = ["--output_dir", str(run), "--resume_from_checkpoint", "latest"]
    assert begun(2**40, *where, precision=None).config.model.mixed_precision == "no"
    (run / "config.yaml").write_text("mixed_precision: bf16\n", encoding="utf-8")
    assert begun(2**40, *where, precision=None).config.model.mixed_precision == "bf16"
    assert begun(2**40, *where).config.model.mixed_precision == "no"
