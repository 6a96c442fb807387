"""Pivotal tuning: embeddings of new tokens, trained beside the LoRA, saved as stock pipelines load them."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from dreamlora import registry
from dreamlora.callbacks.new_tokens import NewTokensCallback
from dreamlora.callbacks.weights import base_model
from dreamlora.cli.parse import parse_run
from dreamlora.commands.doctor.diagnosis import diagnose
from dreamlora.commands.sample.command import main as sample
from dreamlora.errors import UserError
from dreamlora.jsonl import read_jsonl
from dreamlora.runfolder import RunFolder
from dreamlora.schemas import OBJECT
from dreamlora.training import loop, state
from dreamlora.training.loop import Run
from tests import tinymodels
from tests.training.conftest import flags_of, train_with
from tests.training.test_processes import assert_same_weights, train_forked
from tests.training.test_resume import assert_equal_runs, interrupt_after
from tests.training.test_run import same

pytestmark = pytest.mark.usefixtures("no_report")

Train = Callable[..., RunFolder]
TOKENS = ["--new_tokens", "sks:2=d,o"]
PROMPT = "a sks dog"
FAMILIES = ["sd", "sdxl", "flux"]


def embeddings(folder: Path, token: str = "sks") -> dict[str, torch.Tensor]:
    return load_file(folder / "embeddings" / f"{token}.safetensors")


def loaded(pipeline: Any, folder: Path, token: str = "sks") -> Any:
    """A stock pipeline with a token's file, as docs/training.md has it."""
    file = folder / "embeddings" / f"{token}.safetensors"
    parts = {"clip_l": "", "clip_g": "_2"}
    vectors = load_file(file)
    if "emb_params" in vectors:
        pipeline.load_textual_inversion(str(file.parent), weight_name=file.name, token=token)
        return pipeline
    for name, rows in vectors.items():
        tokenizer, encoder = (getattr(pipeline, f"{kind}{parts[name]}") for kind in ("tokenizer", "text_encoder"))
        pipeline.load_textual_inversion(rows, token=token, tokenizer=tokenizer, text_encoder=encoder)
        getattr(encoder, "text_model", encoder).eos_token_id = tokenizer.eos_token_id
    return pipeline


def naming_another_end(model: Path, folder: Path) -> Path:
    """The same model, with the end of a text that configs of most of SDXL's and FLUX's text encoders have."""
    shutil.copytree(model, folder)
    for file in folder.glob("text_encoder*/config.json"):
        config = json.loads(file.read_text(encoding="utf-8"))
        if config["model_type"] == "clip_text_model":
            file.write_text(json.dumps({**config, "eos_token_id": 2}), encoding="utf-8")
    return folder


@pytest.mark.parametrize("end", ["its own", "another"])
@pytest.mark.parametrize("name", FAMILIES)
def test_stock_pipelines_make_the_same_of_prompts(
    prepare: Callable[..., Run],
    tiny_folder: Callable[[str], Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    end: str,
) -> None:
    model = tiny_folder(name) if end == "its own" else naming_another_end(tiny_folder(name), tmp_path / "model")
    run = prepare(model, "--instance_prompt", PROMPT, *TOKENS)
    for part in run.new_tokens.values():
        part.rows.data.normal_(generator=torch.Generator().manual_seed(1))
    state.save_lora(run, tmp_path)
    pipeline = loaded(DiffusionPipeline.from_pretrained(model, safety_checker=None), tmp_path)
    with torch.no_grad():
        expected = tinymodels.of(name).embeddings(pipeline, [PROMPT])
        ours = run.call_arguments([PROMPT])
    assert all(torch.equal(ours[key], value) for key, value in expected.items())
    warned = any("names a wrong token as the end" in record.getMessage() for record in caplog.records)
    assert warned == (end == "another" and name != "sd")


@pytest.mark.parametrize("more", ["", "--train_text_encoder", "--mixed_precision bf16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_saved_files_do_what_training_showed(
    photos: Path, cache: Path, tiny_folder: Callable[[str], Path], tmp_path: Path, name: str, more: str
) -> None:
    run = train_with([*flags_of(photos, cache, tiny_folder(name), tmp_path / "run"), *TOKENS, *more.split()])
    parity = json.loads(run.summary_file.read_text(encoding="utf-8"))["parity"]
    rounding = "bf16" in more
    assert parity["max_abs"] <= (40 if rounding else 1)
    assert parity["call"]["error"] <= parity["call"]["rounding"] + 0.02 and parity["call"]["effect"] > 0.01
    assert parity["call"]["rounding"] < (0.5 if rounding else 1e-3), "a wrong embedding is no rounding"
    for place in (run.path, run.best, run.checkpoint_dir(6)):
        assert embeddings(place).keys() == set(registry.load("families", name).EMBEDDING_KEYS.values())
        assert all(rows.shape[0] == 2 and rows.dtype == torch.float32 for rows in embeddings(place).values())
    assert same(embeddings(run.path), embeddings(run.checkpoint_dir(6)))
    assert not same(embeddings(run.path), embeddings(run.checkpoint_dir(2)))


def test_the_check_sees_a_file_without_its_embeddings(
    photos: Path, cache: Path, sd_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dreamlora.training import parity

    monkeypatch.setattr(parity, "load_embeddings", lambda pipeline, files, keys: None)
    run = train_with([*flags_of(photos, cache, sd_folder, tmp_path / "run"), *TOKENS])
    call = json.loads(run.summary_file.read_text(encoding="utf-8"))["parity"]["call"]
    assert call["error"] > call["rounding"] + 0.1


def test_a_resumed_run_is_the_uninterrupted_one(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = [*TOKENS, "--new_tokens_end", "4", "--lr_scheduler", "cosine", "--optimizer", "scaled_adamw"]
    more += ["--ema_decay", "0.9"]
    whole = train(*more, "--output_dir", str(tmp_path / "whole" / "run"))
    for step in (3, 5):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            interrupt_after(patch, step)
            train(*more, "--overwrite_output_dir")
        resumed = train(*more, "--resume_from_checkpoint", "latest")
        assert_equal_runs(whole, resumed)
        assert same(embeddings(whole.path), embeddings(resumed.path))
        assert same(embeddings(whole.best), embeddings(resumed.best))
    with pytest.raises(UserError, match="new_tokens: "):
        train("--new_tokens", "sks:2=o,d", "--resume_from_checkpoint", "step-000004")


def test_two_processes_equal_one(flags: list[str], train: Train, tmp_path: Path) -> None:
    quick = "--optimizer sgd --learning_rate 0.1 --sample_steps 0 --eval_steps 0 --holdout 0 --max_train_steps 3"
    more = [*quick.split(), *TOKENS, "<other>", "--new_tokens_lr", "1"]
    one = train(*more, "--output_dir", str(tmp_path / "one"))
    train_forked([*flags, *more])
    two = RunFolder(tmp_path / "run")
    assert_same_weights(one, two)
    for token in ("sks", "other"):
        first, second = (embeddings(run.path, token)["emb_params"] for run in (one, two))
        assert torch.allclose(first, second, atol=1e-7)


@pytest.mark.parametrize("optimizer", ["adamw", "scaled_gd", "schedulefree_adamw"])
def test_they_train_until_their_end(train: Train, optimizer: str) -> None:
    registry.check_needs("optimizers", optimizer)
    run = train(*TOKENS, "--new_tokens_end", "0.67", "--optimizer", optimizer, "--new_tokens_weight_decay", "0.1")
    rows = {step: embeddings(run.checkpoint_dir(step))["emb_params"] for step in (2, 4, 6)}
    assert not torch.equal(rows[2], rows[4])
    assert torch.allclose(rows[4], rows[6], rtol=0, atol=1e-7 if optimizer == "schedulefree_adamw" else 0)
    first, last = (load_file(run.checkpoint_dir(step) / run.lora_file.name) for step in (4, 6))
    assert not same(first, last), "the LoRA goes on"
    norms = {row["step"]: row["value"] for row in run.metrics() if row["name"] == "tokens/norm"}
    change = {row["step"]: row["value"] for row in run.metrics() if row["name"] == "tokens/change"}
    assert list(norms) == [0, 3, 6] and change[0] == 0 and change[3] > 0


@pytest.mark.parametrize(
    ("more", "rate"),
    [
        ([], 1e-2),
        (["--new_tokens_lr", "0.5"], 0.5),
        (["--new_tokens_lr", "0.25", "--scale_lr"], 1.0),
        (["--optimizer", "scaled_gd"], 1e-4),
        (["--optimizer", "scaled_gd", "--new_tokens_lr", "0.5"], 0.5),
        (["--optimizer", "lora_muon", "--new_tokens_lr", "0.5"], 0.5),
    ],
)
def test_they_have_a_rate_and_a_decay_of_their_own(
    prepare: Callable[..., Run], sd_folder: Path, more: list[str], rate: float
) -> None:
    run = prepare(sd_folder, *TOKENS, *more, "--train_text_encoder")
    [rows] = [part.rows for part in run.new_tokens.values()]
    [group] = [group for group in run.optimizer.param_groups if any(p is rows for p in group["params"])]
    assert len(group["params"]) == 1 and group["lr"] == rate and group["weight_decay"] == 0
    held = sum(rows is p for group in run.optimizer.param_groups for p in group["params"])
    assert held == 1 and "new_tokens.text_encoder.rows" in run.trainables


def test_only_the_new_rows_change(prepare: Callable[..., Run], sd_folder: Path) -> None:
    run = prepare(sd_folder, *TOKENS, "--new_tokens_lr", "0.1")
    encoder = run.components["text_encoder"]
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    for _ in range(2):
        loop.optimizer_step(run, loop.next_batches(run, run.step, 0))
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    [part] = run.new_tokens.values()
    moved = part.rows.detach().clone()
    assert bool((moved != part.start).all())
    with base_model(run):
        assert torch.equal(part.rows, part.start)
    assert torch.equal(part.rows, moved)


@pytest.mark.parametrize(("optimizer", "length"), [("adamw", 2**0.9), ("schedulefree_adamw", 2.0)])
def test_a_step_brings_their_length_back(
    prepare: Callable[..., Run], sd_folder: Path, optimizer: str, length: float
) -> None:
    registry.check_needs("optimizers", optimizer)
    run = prepare(sd_folder, *TOKENS, "--new_tokens_lr", "0", "--optimizer", optimizer)
    [part] = run.new_tokens.values()
    part.rows.data *= 2
    loop.optimizer_step(run, loop.next_batches(run, 0, 0))
    assert torch.allclose(part.rows.norm(dim=1) / part.start.norm(dim=1), torch.tensor(length))


def test_from_the_end_on_they_need_no_gradient(prepare: Callable[..., Run], sd_folder: Path) -> None:
    run = prepare(sd_folder, *TOKENS)
    [part] = run.new_tokens.values()
    ending = NewTokensCallback(0, 1)
    ending.on_start(run)
    result, batches = loop.optimizer_step(run, loop.next_batches(run, 0, 0))
    assert part.rows.requires_grad
    ending.on_step(run, result)
    before = part.rows.detach().clone()
    loop.optimizer_step(run, batches)
    assert not part.rows.requires_grad and torch.equal(part.rows, before)


def test_embeddings_of_other_tokens_are_no_ones_cache(prepare: Callable[..., Run], flux_folder: Path) -> None:
    """Of FLUX.1's prompts T5's states are kept together with CLIP's tokens."""
    ids = [
        prepare(flux_folder, *more, "--train_text_encoder", "--instance_prompt", PROMPT).conditioning([PROMPT], {})[
            "input_ids"
        ]
        for more in ([], ["--new_tokens", "sks"], ["--new_tokens", "sks:2"], [])
    ]
    assert torch.equal(ids[0], ids[3])
    assert not torch.equal(ids[0], ids[1]) and not torch.equal(ids[1], ids[2])


@pytest.mark.parametrize(
    ("prompt", "tokens", "words"),
    [
        ("a photo of a dog", "sks=d", "no caption has sks, so its embedding learns nothing"),
        ("a dog with masks", "sks=d", "have sks inside another word (such as 'a dog with masks')"),
        ("a SKS dog", "sks:2=d", "write sks in capitals (such as 'a SKS dog'), where pipelines read only the first"),
        ("a SKS dog", "sks=d", ""),
        ("a <sks>dog", "<sks>=d", ""),
        ("a photo of sks", "sks:9=d", "more than 16 tokens: what is beyond does not count"),
    ],
)
def test_what_is_told_of_captions(
    prepare: Callable[..., Run],
    sd_folder: Path,
    caplog: pytest.LogCaptureFixture,
    prompt: str,
    tokens: str,
    words: str,
) -> None:
    with caplog.at_level(logging.WARNING, "dreamlora"):
        prepare(sd_folder, "--instance_prompt", prompt, "--new_tokens", tokens)
    told = [record.getMessage() for record in caplog.records if "--new_tokens" in record.getMessage()]
    told += [record.getMessage() for record in caplog.records if "more than" in record.getMessage()]
    assert any(words in text for text in told) if words else not told


@pytest.mark.parametrize(
    ("name", "tokens", "words"),
    [
        ("sd3", "sks=d", "StableDiffusion3Pipeline loads no embeddings of new tokens; the families flux, sd, sdxl do"),
        ("chroma", "sks=d", "ChromaPipeline loads no embeddings of new tokens"),
        ("sd", "sks=dog", "reads 'dog' as 3 tokens (d o g</w>)"),
        ("sdxl", "d=o", "has d among its own tokens"),
    ],
)
def test_what_the_model_cannot_do_is_told_before_any_work(
    tiny_folder: Callable[[str], Path], photos: Path, cache: Path, tmp_path: Path, name: str, tokens: str, words: str
) -> None:
    flags = [*flags_of(photos, cache, tiny_folder(name), tmp_path / "run"), "--new_tokens", tokens]
    with pytest.raises(UserError) as refused:
        train_with(flags)
    assert words in str(refused.value) and not (tmp_path / "run").exists()
    found = diagnose(*parse_run(flags))
    assert any(words in error for error in found["errors"])


def test_doctor_counts_the_text_encoders(
    tiny_folder: Callable[[str], Path], photos: Path, cache: Path, tmp_path
) -> None:
    flags = flags_of(photos, cache, tiny_folder("sdxl"), tmp_path / "run")
    plain, with_tokens = (diagnose(*parse_run([*flags, *more])) for more in ([], TOKENS))
    assert not with_tokens["errors"]
    held = [
        next(stage for stage in found["memory"]["stages"] if stage["stage"] == "training")["held"]
        for found in (plain, with_tokens)
    ]
    assert held[1] > held[0]


def test_embeddings_by_hand(train: Train, tmp_path: Path) -> None:
    run = train(*TOKENS, "--new_tokens_lr", "0.3")
    alone = tmp_path / "alone"
    alone.mkdir()
    lora = Path(shutil.copy(run.lora_file, alone))
    common = ["--prompts", "a photo of sks dog", "--num_inference_steps", "2", "--resolution", "16"]
    model = ["--pretrained_model_name_or_path", run.config()["pretrained_model_name_or_path"], "--trust_runs"]

    def drawn(*flags: Any) -> str:
        sample([*map(str, flags), *common, *model, "--output_dir", str(tmp_path / "out")])
        return list(read_jsonl(tmp_path / "out" / "samples.jsonl", OBJECT))[-1]["sha256"]

    with_them = drawn(run.path)
    file = run.embeddings / "sks.safetensors"
    assert drawn(lora) != with_them
    assert drawn(lora, "--embeddings", file) == with_them
    shutil.copytree(run.embeddings, alone / "embeddings")
    assert drawn(lora) == with_them
    with pytest.raises(UserError, match="no such file of embeddings"):
        drawn(lora, "--embeddings", tmp_path / "none.safetensors")


def test_a_run_without_them_has_no_folder(train: Train) -> None:
    run = train("--max_train_steps", "2")
    assert not run.embeddings.exists()
    assert SimpleNamespace(**run.config()).new_tokens == []
