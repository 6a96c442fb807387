"""Memory that does not suffice, in every stage of every program: one sentence with the stage and the flags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from dreamlora.__main__ import main
from dreamlora.callbacks import evaluate, image_metrics, sample
from dreamlora.commands import under_test
from dreamlora.commands.evaluate import drawing, losses
from dreamlora.commands.evaluate import evaluate as evaluation
from dreamlora.commands.sample import draw
from dreamlora.families import sd
from dreamlora.run import assemble, images
from dreamlora.runfolder import RunFolder
from dreamlora.sweep import worker
from dreamlora.training import loop, parity, start
from tests.training.conftest import flags_of, photos, train_with  # noqa: F401 - a fixture

CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB."


def lacking(*_: Any, **__: Any) -> None:
    raise torch.OutOfMemoryError(CUDA)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def flags(photos: Path, cache: Path, sd_folder: Path, tmp_path: Path) -> list[str]:  # noqa: F811
    AcceleratorState._reset_state(reset_partial_state=True)
    return ["dreambooth", *flags_of(photos, cache, sd_folder, tmp_path / "run"), "--train_batch_size", "2"]


STAGES = {
    "class images": (images, "draw_batch", "--with_prior_preservation --class_prompt dog --num_class_images 2", ""),
    "encoding images": (sd, "encode_images", "--latents_cache_dir {new} --no_vae_tiling", "no --no_vae_tiling"),
    "encoding prompts": (sd, "encode_tokens", "--latents_cache_dir {new}", "--text_encoder_precision int8"),
    "loading the model": (assemble, "with_lora", "", "--base_precision int8"),
    "starting the LoRA": (start, "initialise", "", "--gradient_checkpointing"),
    "training": (loop, "optimizer_step", "", "--train_batch_size 1 --gradient_accumulation_steps 2"),
    "evaluation loss": (evaluate, "evaluate_loss", "", "--eval_batch_size 1"),
    "drawing samples": (sample, "draw", "", "--sample_steps 0"),
    "image metrics": (image_metrics, "measure", "--eval_metrics diversity", "dreamlora evaluate"),
}
"""Where it is short: what is called there, flags that lead there, and advice."""


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_of_a_run_says_where_and_what_helps(
    stage: str, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    owner, name, more, advice = STAGES[stage]
    monkeypatch.setattr(owner, name, lacking)
    assert main([*flags, *more.format(new=tmp_path / "new").split()]) == 1
    said = capsys.readouterr().err
    [told] = [line for line in said.splitlines() if line.startswith("error: ")]
    assert told.startswith(f"error: memory does not suffice in the stage '{stage}' (CUDA out of memory")
    assert advice in told and "Traceback" not in said


def test_what_is_on_already_is_not_advised(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "optimizer_step", lacking)
    flags += ["--gradient_checkpointing", "--mixed_precision", "bf16", "--base_precision", "int8"]
    assert main([*flags, "--train_batch_size", "1"]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    for flag in ("--gradient_checkpointing", "--mixed_precision", "--train_batch_size", "--base_precision int8"):
        assert flag not in told
    assert "--resolution below 16" in told


def test_of_a_training_nothing_is_lost(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Samples at step 3 do not fit: the weights of that step are kept, and the run goes on with what takes less."""
    original = sample.draw

    def lacking_later(*given: Any) -> Any:
        return lacking() if RunFolder(tmp_path / "run").sample_rows() else original(*given)

    monkeypatch.setattr(sample, "draw", lacking_later)
    assert main([*flags, "--checkpointing_steps", "100"]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    run = RunFolder(tmp_path / "run")
    assert run.checkpoint_steps() == [2], "the step before the one that was to be drawn"
    assert "--resume_from_checkpoint latest" in told and "--base_precision int8 (in a new run)" in told
    assert "--sample_steps 0, and" in told, "which a resumed run may be given"
    AcceleratorState._reset_state(reset_partial_state=True)
    more = ["--resume_from_checkpoint", "latest", "--sample_steps", "0", "--gradient_checkpointing"]
    assert main([*flags, "--checkpointing_steps", "100", *more]) == 0
    assert run.lora_file.exists()


def test_a_parity_check_that_lacks_memory_is_told_in_the_summary(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(parity, "check", lacking)
    assert main([*flags, "--max_train_steps", "1"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert "CUDA out of memory" in summary["parity"]["reason"]


@pytest.fixture(scope="module")
def made(photos: Path, cache: Path, sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:  # noqa: F811
    folder = tmp_path_factory.mktemp("made") / "run"
    few = ["--max_train_steps", "1", "--no_parity_check", "--final_eval_items", "0"]
    return train_with([*flags_of(photos, cache, sd_folder, folder), *few])


COMMANDS = {
    "loading": ("sample", under_test.Parts, "drawer", "loading the model", "--base_precision int8"),
    "encoding": ("sample", sd, "encode_tokens", "encoding prompts", "--text_encoder_precision int8"),
    "drawing": ("sample", draw, "draw", "drawing samples", "--mixed_precision bf16"),
    "loss": ("evaluate", losses, "evaluate_loss", "evaluation loss", "--eval_batch_size 1"),
    "drawing to measure": ("evaluate", drawing, "draw_batch", "drawing samples", "a smaller --resolution"),
    "measuring": ("evaluate", evaluation, "measure", "image metrics", "a smaller --clip_model"),
}


@pytest.mark.parametrize("case", COMMANDS)
def test_sample_and_evaluate_say_it_in_the_same_words(
    case: str, made: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command, owner, name, stage, advice = COMMANDS[case]
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(owner, name, lacking)
    assert main([command, str(made.path), "--trust_runs", "--output_dir", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert f"error: memory does not suffice in the stage '{stage}' (CUDA out of memory" in said
    assert advice in said.splitlines()[-1] and "Traceback" not in said


def test_a_run_of_a_comparison_records_it(flags: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(loop, "optimizer_step", lacking)
    outcome = worker.make_run("dreambooth", flags[1:], tmp_path / "run", "adamw")
    assert outcome["status"] == "failed"
    assert outcome["message"].startswith("memory does not suffice in the stage 'training' (CUDA out of memory")
