"""Runs on a frozen base in fewer bits: the same as on a model with the unpacked weights, on every path."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from dreamlora import precision, registry
from dreamlora.commands.inspect.about import about
from dreamlora.compare.methods import labelled
from dreamlora.compare.records import read_record
from dreamlora.eval_loss.evalset import EvalSet
from dreamlora.lora.health import snapshots
from dreamlora.lora.pairs import adapted_layers
from dreamlora.precision import QuantizedLinear
from dreamlora.runfolder import RunFolder
from dreamlora.training import loop
from dreamlora.training.loop import Run
from tests.training.conftest import flags_of, train_with
from tests.training.forked import in_two_processes, run_forked

pytestmark = pytest.mark.usefixtures("no_report")

INT8 = ["--base_precision", "int8", "--text_encoder_precision", "int8"]
LOOP = "--max_train_steps 4 --sample_steps 0 --eval_steps 0 --final_eval_items 0 --no_parity_check"
WHOLE = "--max_train_steps 4 --sample_steps 4 --eval_steps 2 --num_inference_steps 1 --train_batch_size 2"
PRIOR = ["--with_prior_preservation", "--class_prompt", "a photo of a dog", "--num_class_images", "2"]


@pytest.fixture
def flags(photos: Path, cache: Path, flux_folder: Path, tmp_path: Path) -> list[str]:
    return flags_of(photos, cache, flux_folder, tmp_path / "run")


@pytest.fixture(scope="module")
def unpacked(flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline, whose transformer's weights are what int8 makes of them."""
    pipeline = FluxPipeline.from_pretrained(flux_folder)
    precision.quantize(pipeline.transformer, "int8", torch.device("cpu"))
    for name, layer in list(pipeline.transformer.named_modules()):
        if isinstance(layer, QuantizedLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.weight.data, plain.bias = layer.weight, layer.bias
            parent, _, last = name.rpartition(".")
            setattr(pipeline.transformer.get_submodule(parent), last, plain)
    folder = tmp_path_factory.mktemp("unpacked") / "model"
    pipeline.save_pretrained(folder)
    return folder


def summary(run: RunFolder) -> dict[str, Any]:
    return json.loads(run.summary_file.read_text(encoding="utf-8"))


def losses(run: RunFolder) -> dict[int, float]:
    return {row["step"]: row["value"] for row in run.metrics() if row["name"] == "eval/loss"}


def same(run: RunFolder, other: RunFolder, atol: float = 0.0) -> bool:
    left, right = load_file(run.lora_file), load_file(other.lora_file)
    return left.keys() == right.keys() and all(
        torch.allclose(left[name], right[name], rtol=0, atol=atol) for name in left
    )


@pytest.mark.parametrize("init", registry.names("inits"))
def test_every_init_starts_as_on_the_unpacked_weights(init: str, prepare, flux_folder: Path, unpacked: Path) -> None:
    few = ["--init_args", "draws", "2"] if hasattr(registry.load("inits", init).Options(), "draws") else []
    starts = []
    for model, more in ((flux_folder, INT8[:2]), (unpacked, [])):
        run: Run = prepare(model, "--init", init, "--resolution", "16", "--train_batch_size", "2", *few, *more)
        starts.append({each.name: each for each in adapted_layers(run.accelerator.unwrap_model(run.model).denoiser)})
    quantised, plain = starts
    assert quantised.keys() == plain.keys()
    for name, layer in quantised.items():
        assert isinstance(layer.layer.base_layer, QuantizedLinear)
        torch.testing.assert_close(layer.A, plain[name].A, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.B, plain[name].B, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapter", registry.names("adapters"))
def test_every_adapter_trains_as_on_the_unpacked_weights(adapter: str, flags, unpacked: Path, tmp_path: Path) -> None:
    more = ["--adapter", adapter, *LOOP.split(), "--eval_steps", "4", "--train_batch_size", "2"]
    quantised = train_with([*flags, *more, *INT8[:2]])
    plain = [*flags, *more, "--pretrained_model_name_or_path", str(unpacked), "--output_dir", str(tmp_path / "plain")]
    other = train_with(plain)
    assert losses(quantised) == pytest.approx(losses(other), rel=1e-5)
    assert same(quantised, other, atol=1e-4)


@pytest.mark.parametrize("word", ["nf4", "fp8", "int8"])
def test_a_stock_pipeline_with_the_same_base_draws_what_training_drew(word: str, flags, request) -> None:
    """With class images, gradient checkpointing and an average, in half precision; int8 in a fresh pipeline."""
    if word == "nf4":
        request.getfixturevalue("bitsandbytes")
    half = {"nf4": "bf16", "fp8": "fp16", "int8": "no"}[word]
    more = ["--gradient_checkpointing", "--ema_decay", "0.5", "--mixed_precision", half, *PRIOR]
    more += ["--parity", "full"] if word == "int8" else []
    run = train_with([*flags, *WHOLE.split(), *more, "--base_precision", word, "--text_encoder_precision", word])
    found = summary(run)["parity"]
    assert found["call"]["effect"] > 1e-2 and found["call"]["error"] < 0.05 * found["call"]["effect"] + 1e-2, found
    assert found["max_abs"] <= 2, found
    with safe_open(run.lora_file, "pt") as file:
        said = file.metadata()
    assert about(said)["precision of the base model's weights"] == word
    assert about(said)["precision of the text encoders' weights"] == word
    outline = json.loads(run.outline_file.read_text(encoding="utf-8"))
    assert f"weights in {word}, text encoders in {word})" in outline["model"]


def test_a_text_encoder_in_fewer_bits_trains_with_new_tokens(flags) -> None:
    run = train_with([*flags, *WHOLE.split(), *INT8, "--train_text_encoder", "--new_tokens", "sks:2=d,o"])
    assert any(name.startswith("text_encoder.") for name in load_file(run.lora_file))
    assert summary(run)["parity"]["call"]["error"] < 1e-3


def test_killed_and_resumed_equals_uninterrupted(flags, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With class images, buckets and dropout."""
    shared = [*flags, *LOOP.split(), *INT8, *PRIOR, "--buckets", "--lora_dropout", "0.2", "--train_batch_size", "2"]
    whole = train_with([*shared, "--output_dir", str(tmp_path / "whole")])
    killed = [*shared, "--output_dir", str(tmp_path / "killed")]
    step = loop.optimizer_step

    def dying(run: Run, batches: Any) -> Any:
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(run, batches)

    monkeypatch.setattr(loop, "optimizer_step", dying)
    assert run_forked([lambda: train_with(killed)], [{}]) == [-signal.SIGKILL]
    monkeypatch.undo()
    assert not RunFolder(tmp_path / "killed").lora_file.exists()
    resumed = train_with([*killed, "--resume_from_checkpoint", "latest"])
    assert same(whole, resumed)


@pytest.mark.parametrize("word", ["fp8", "nf4"])
def test_two_processes_equal_one(word: str, flags, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if word == "nf4":
        request.getfixturevalue("bitsandbytes")
    shared = [*flags, *LOOP.split(), "--base_precision", word, "--optimizer", "sgd", "--learning_rate", "0.1"]
    one = train_with([*shared, "--train_batch_size", "2", "--output_dir", str(tmp_path / "one")])
    two = [*shared, "--train_batch_size", "1", "--output_dir", str(tmp_path / "two")]
    assert in_two_processes(lambda: train_with(two)) == [0, 0]
    assert same(one, RunFolder(tmp_path / "two"), atol=1e-6)


def test_training_goes_on_from_the_last_loss_and_runs_of_several_precisions_are_compared(flags, tmp_path: Path) -> None:
    short = [*LOOP.split(), "--eval_steps", "4", "--train_batch_size", "2"]
    first = train_with([*flags, *short, *INT8])
    on = [*flags, *short, *INT8, "--init_lora", str(first.path), "--output_dir", str(tmp_path / "on")]
    assert losses(train_with(on))[0] == losses(first)[4]
    full = train_with([*flags, *short, "--output_dir", str(tmp_path / "full")])
    assert EvalSet.load(full.evalset_file).id == EvalSet.load(first.evalset_file).id
    assert losses(full)[0] != losses(first)[0]
    methods = labelled([read_record(run.path, "x") for run in (full, first)])
    assert [len(runs) for runs in methods.values()] == [1, 1]
    assert any("base_precision=int8" in label for label in methods)


def test_class_images_of_another_precision_are_others(flags, tmp_path: Path) -> None:
    shared = [*flags, *LOOP.split(), "--max_train_steps", "1", *PRIOR]
    for name, more in (("a", INT8), ("b", []), ("c", INT8[:2])):
        train_with([*shared, *more, "--output_dir", str(tmp_path / "runs" / name)])
    assert len(list((tmp_path / "runs" / "class_images").iterdir())) == 3


def test_what_measures_a_lora_unpacks_no_weight(prepare, flux_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run: Run = prepare(flux_folder, "--resolution", "16", *INT8[:2])
    lokr: Run = prepare(flux_folder, "--resolution", "16", *INT8[:2], "--adapter", "lokr")
    monkeypatch.setattr(QuantizedLinear, "dense", None)
    for each in (run, lokr):
        assert snapshots({"": each.accelerator.unwrap_model(each.model).denoiser})
