"""Runs with every init: row 0 is the base model, the file is a plain LoRA, a resume changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors import safe_open

from dreamlora import registry
from dreamlora.errors import UserError
from dreamlora.runfolder import RunFolder
from dreamlora.training import loop
from tests.training.test_resume import assert_equal_runs, interrupt_after
from tests.training.test_run import weights

pytestmark = pytest.mark.usefixtures("no_report")

Train = Callable[..., RunFolder]
LINEAR = "--lora_layers to_q to_k to_v to_out.0"
FLAGS = {
    "eva": f"{LINEAR} --init_args draws 8 tau 0.5",
    "lora_ga": "--lora_layers all --init_args draws 8 gamma 64",
    "nora": "--lora_layers all --init_args sigma 0.1",
}
OFFSET = [name for name in registry.names("inits") if registry.load("inits", name).OFFSET]


def flags_of(init: str) -> list[str]:
    return f"--init {init} {FLAGS.get(init, '--lora_layers all')}".split()


def images_at(run: RunFolder, step: int) -> list[bytes]:
    return [file.read_bytes() for file in sorted(run.sample_dir(step).glob("*.png"))]


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """Images and loss at step 0 of the first run here; all others must have the same."""
    return {}


@pytest.mark.parametrize("init", ["gaussian", *(name for name in registry.names("inits") if name != "gaussian")])
def test_row_0_is_the_base_model_and_the_file_does_what_training_showed(
    init: str, train: Train, seen: dict[str, Any]
) -> None:
    text = [] if init == "eva" else ["--train_text_encoder"]
    run = train(*flags_of(init), *text, *["--max_train_steps", "1", "--sample_steps", "1", "--eval_steps", "1"])
    losses = [row["value"] for row in run.metrics() if row["name"] == "eval/loss"]
    assert images_at(run, 0) == seen.setdefault("images", images_at(run, 0))
    assert losses[0] == pytest.approx(seen.setdefault("loss", losses[0]), rel=1e-6 if init == "orthogonal" else 0)
    assert images_at(run, 1) != seen["images"] and losses[1] != losses[0]
    assert json.loads(run.summary_file.read_text(encoding="utf-8"))["parity"]["max_abs"] <= 1
    with safe_open(run.lora_file, framework="pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
        ranks = {file.get_slice(key).get_shape()[0] for key in file.keys() if "lora_A" in key}  # noqa: SIM118
    rank = 4 if init in OFFSET else 2
    assert ranks == {rank}
    assert {value for key, value in settings.items() if key.endswith((".r", ".lora_alpha"))} == {rank}


@pytest.mark.parametrize(("init", "family"), [("lora_ga", "sd"), ("pissa", "flux")])
def test_the_exported_file_predicts_what_the_adapter_in_training_does(
    init: str, family: str, train: Train, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock loading, compared as numbers instead of pixels; alpha is not the rank."""
    from dreamlora.run import ending

    folder = request.getfixturevalue(f"{family}_folder")
    seen = []

    def look(stage, run):
        draw = torch.Generator().manual_seed(0)
        name = stage.family.DENOISER
        denoiser = run.components[name].eval()
        stock = diffusers.DiffusionPipeline.from_pretrained(folder, safety_checker=None)
        stock.load_lora_weights(run.folder.path)
        noisy = torch.randn(2, 4, 8, 8, generator=draw)
        times = run.objective.draw_times(torch.rand(2, 2, generator=draw), (8, 8))
        conditioning = run.conditioning(["a photo of sks dog"] * 2, {})
        with torch.no_grad():
            for module in (denoiser, getattr(stock, name)):
                seen.append(stage.family.predict(module, noisy, times, conditioning, 3.5))
            denoiser.disable_adapters()
            seen.append(stage.family.predict(denoiser, noisy, times, conditioning, 3.5))
        return "looked at elsewhere"

    monkeypatch.setattr(ending, "_expected_output", look)
    model = ["--pretrained_model_name_or_path", str(folder), "--lora_alpha", "3", "--max_train_steps", "3"]
    train(*flags_of(init), *model, "--sample_steps", "0", "--eval_steps", "0")
    training, loaded, base = seen
    torch.testing.assert_close(loaded, training, rtol=1e-4, atol=1e-5)
    assert (training - base).abs().max() > 1e-3


@pytest.mark.parametrize("init", ["lora_ga", "nora"])
def test_resumed_equals_uninterrupted(init: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    more = [*flags_of(init), "--optimizer", "scaled_adamw", "--lora_dropout", "0.2", "--train_text_encoder"]
    whole = train(*more, "--output_dir", str(tmp_path / "whole" / "run"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 3)
        train(*more)
    from dreamlora.training import start

    monkeypatch.setattr(start, "initialise", lambda *_: pytest.fail("the start is in the checkpoint"))
    assert_equal_runs(whole, train(*more, "--resume_from_checkpoint", "latest"))


def test_the_layers_begin_with_what_the_init_gives(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start that does not reach the layers' weights would look like any other run."""
    nora, given = registry.load("inits", "nora"), []
    starts = nora.starts

    def kept(targets: Any, options: Any, probe: Any) -> Iterator[Any]:
        for target, begin in zip(targets, starts(targets, options, probe), strict=True):
            given.append((target, begin))
            yield begin

    def check(run: Any) -> None:
        assert len(given) == len(run.trainables) / 2
        for target, begin in given:
            assert torch.equal(target.A.flatten(1), begin.A) and torch.equal(target.B.flatten(1), begin.B)
            assert begin.A.any()
        raise UserError("enough")

    monkeypatch.setattr(nora, "starts", kept)
    monkeypatch.setattr(loop, "train", check)
    with pytest.raises(UserError, match="enough"):
        train(*flags_of("nora"), "--max_train_steps", "1", "--sample_steps", "0", "--eval_steps", "0")


def test_other_settings_of_the_init_are_refused(train: Train) -> None:
    train("--max_train_steps", "2", "--init", "nora")
    with pytest.raises(UserError, match=r"init: 'nora' then, 'pissa' now"):
        train("--resume_from_checkpoint", "latest", "--init", "pissa")
    with pytest.raises(UserError, match=r"init_args: \[\] then, \['sigma', '0.1'\] now"):
        train("--resume_from_checkpoint", "latest", "--init", "nora", "--init_args", "sigma", "0.1")


def test_an_odd_rank_is_refused_before_a_model_is_loaded(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    from dreamlora.models import parts

    monkeypatch.setattr(parts.Parts, "get", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=r"--init orthogonal needs a --rank that is a multiple of 2 \(got 3\)"):
        train("--init", "orthogonal", "--rank", "3")


def test_weight_decay_is_off_where_it_would_pull_away_from_the_base(train: Train) -> None:
    for init, expected in (("gaussian", "0.01"), ("pissa", "0.0")):
        run = train("--init", init, "--max_train_steps", "1", "--overwrite_output_dir", "--sample_steps", "0")
        assert f"adam_weight_decay: {expected}\n" in run.config_file.read_text(encoding="utf-8")


def test_lora_ga_in_half_precision(train: Train) -> None:  # fp16 takes many minutes on a CPU
    run = train(*flags_of("lora_ga"), "--mixed_precision", "bf16", "--max_train_steps", "1", "--gradient_checkpointing")
    assert all(tensor.isfinite().all() for tensor in weights(run).values())
