"""Runs with every kind of adapter: they learn, are resumed to the last bit, and measure the base model as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dreamlora import registry
from dreamlora.callbacks.weights import base_model
from dreamlora.eval_loss.items import ItemLosses
from dreamlora.lora.pairs import tuned_layers
from dreamlora.runfolder import RunFolder
from dreamlora.training import loop, state
from dreamlora.training.loop import Run
from tests.training.test_resume import assert_equal_runs, interrupt_after

pytestmark = pytest.mark.usefixtures("no_report")

Train = Callable[..., RunFolder]
KINDS = {
    "dora": "--adapter dora --lora_layers all --train_text_encoder --lora_alpha 3",
    "loha": "--adapter loha --lora_layers all --adapter_args use_effective_conv2d true module_dropout 0.2",
    "lokr": "--adapter lokr --train_text_encoder --adapter_args decompose_both true rank_dropout 0.2",
    "patterns": "--use_rslora --lora_layers attn-mlp --lora_blocks 0 mid_block --rank_pattern ff 3 attn2 1 "
    "--train_text_encoder --text_encoder_rank 4",
}


@pytest.mark.parametrize("kind", ["dora", "lokr"])
def test_resumed_equals_uninterrupted(kind: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = [*KINDS[kind].split(), "--sample_steps", "6", "--num_validation_images", "1"]
    whole = train(*more, "--output_dir", str(tmp_path / "whole" / "run"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 3)
        train(*more)
    assert_equal_runs(whole, train(*more, "--resume_from_checkpoint", "latest"))
    losses = ItemLosses.found(whole.final_items_file)
    assert losses is not None and losses.mean(6) < losses.mean(0)
    assert all(tensor.isfinite().all() for tensor in load_file(whole.lora_file).values())


@pytest.mark.parametrize("kind", ["dora", "patterns"])
def test_the_file_does_in_stock_diffusers_what_training_showed(kind: str, train: Train) -> None:
    run = train(*KINDS[kind].split(), "--max_train_steps", "3", "--sample_steps", "3")
    call = json.loads(run.summary_file.read_text(encoding="utf-8"))["parity"]["call"]
    assert call["effect"] > 1e-3 and call["error"] < 1e-3 and call["scale"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_in_the_base_model_nothing_is_left_of_the_adapter(kind: str, prepare: Any, sd_folder: Path) -> None:
    run: Run = prepare(sd_folder, *KINDS[kind].split())
    run.model.eval()
    inputs = prediction_inputs(run)
    first = run.predict(*inputs)
    loop.train(run)
    run.model.eval()
    learned = run.predict(*inputs)
    with base_model(run):
        silent = run.predict(*inputs)
        for layer in tuned_layers(run.accelerator.unwrap_model(run.model)):
            layer.layer.enable_adapters(False)
        assert torch.equal(silent, run.predict(*inputs)) and torch.equal(silent, first)
        for layer in tuned_layers(run.accelerator.unwrap_model(run.model)):
            layer.layer.enable_adapters(True)
    assert torch.equal(run.predict(*inputs), learned) and not torch.equal(learned, first)


@torch.no_grad()
def prediction_inputs(run: Run) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    latents = run.stream.sources[0].store.latents(0, 0)[0][None]
    view = run.stream.sources[0].store.view(0, 0)
    return (
        latents,
        run.objective.spread_times(torch.tensor([0.5])),
        {**run.conditioning(["a photo of sks dog"], view), **view},
    )


@pytest.mark.parametrize("optimizer", registry.names("optimizers"))
def test_every_optimizer_moves_magnitudes_too(optimizer: str, prepare: Any, sd_folder: Path) -> None:
    try:
        registry.check_needs("optimizers", optimizer)
    except Exception as error:
        pytest.skip(str(error))
    rate = ["--learning_rate", "1"] if optimizer == "prodigy" else []
    run: Run = prepare(sd_folder, "--adapter", "dora", "--optimizer", optimizer, "--max_train_steps", "3", *rate)
    before = {name: parameter.detach().clone() for name, parameter in run.trainables.items()}
    magnitudes = [name for name in before if "magnitude" in name]
    decays = [
        group.get("weight_decay", 0.0)
        for group in run.optimizer.param_groups
        if any(parameter is run.trainables[name] for parameter in group["params"] for name in magnitudes)
    ]
    assert len(magnitudes) == len(before) / 3 and set(decays) == {0.0}
    loop.train(run)
    moved = [not torch.equal(before[name], run.trainables[name]) for name in magnitudes]
    assert any(moved) if optimizer == "prodigy" else all(moved)  # its first steps are small
    state.restore(run, torch.load(state.save(run) / state.STATE_FILE, weights_only=True))


def test_starts_go_by_the_seed_and_the_name_alone(prepare: Any, sd_folder: Path) -> None:
    draws = []
    for seed in ("0", "0", "1"):
        torch.manual_seed(int(torch.randint(100, ())))
        run: Run = prepare(sd_folder, "--adapter", "lokr", "--seed", seed)
        draws.append(torch.cat([parameter.detach().flatten() for parameter in run.trainables.values()]))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
