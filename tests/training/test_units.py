"""``--lora_units start`` through the real training program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dreamlora import registry
from dreamlora.errors import UserError
from dreamlora.optimizers._units import unit_scales
from dreamlora.runfolder import RunFolder
from tests.training.test_optimizers import QUICK, flags_of
from tests.training.test_run import same, values, weights

Train = Callable[..., RunFolder]
START = ["--lora_units", "start"]

pytestmark = pytest.mark.usefixtures("no_report")


def scales(folder: RunFolder, step: int) -> list[float]:
    state = torch.load(folder.checkpoint_dir(step) / "training_state.pt", weights_only=True)
    return [c for group in state["optimizer"]["param_groups"] for c in group.get("unit_scales", [])]


@pytest.mark.parametrize("name", ["adamw", "scaled_adamw", "schedulefree_adamw", "lora_plus", "lora_muon"])
def test_a_resumed_run_equals_the_uninterrupted_one(name: str, train: Train, tmp_path: Path) -> None:
    flags = [*flags_of(name), *START, "--lora_alpha", "16", "--ema_decay", "0.5" if name == "adamw" else "0"]
    whole = train(*flags, "--output_dir", str(tmp_path / "whole"))
    resumed = train(
        *flags, "--output_dir", str(tmp_path / "resumed"), "--resume_from_checkpoint", str(whole.checkpoint_dir(2))
    )
    assert same(weights(whole), weights(resumed))
    assert values(whole) == values(resumed)
    assert bool(scales(whole, 2)) == (name != "lora_muon")
    assert whole.config()["lora_units"] == "start"


def test_alpha_drops_out_of_a_whole_run(train: Train, tmp_path: Path) -> None:
    """The text encoder's LoRA, the magnitudes of a DoRA and the clipping of gradients included."""
    losses = []
    for number, alpha in enumerate(("2", "16")):
        more = ["--lora_alpha", alpha, "--train_text_encoder", "--text_encoder_lr", "3e-2", "--max_grad_norm", "1e-3"]
        folder = train(*QUICK, *START, *more, "--adapter", "dora", "--output_dir", str(tmp_path / str(number)))
        losses.append([row["value"] for row in folder.metrics() if row["name"] == "eval/loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] != pytest.approx(losses[0][-1], rel=1e-4)


@pytest.mark.parametrize("init", ["gaussian", "pissa"])
def test_the_start_is_what_init_made_of_it(init: str, train: Train) -> None:
    """The optimizer is older than the start."""
    folder = train(*QUICK, *START, "--init", init, "--learning_rate", "0", "--max_train_steps", "2")
    started = torch.load(folder.checkpoint_dir(2) / "training_state.pt", weights_only=True)["trainables"]
    factors = list(started.values())
    pairs = zip(factors[0::2], factors[1::2], strict=True)
    assert scales(folder, 2) == pytest.approx([c for A, B in pairs for c in unit_scales(A, B, 1.0)], rel=1e-4)


def test_other_units_are_refused_on_resume(train: Train) -> None:
    train(*QUICK)
    with pytest.raises(UserError, match=r"other settings: lora_units: 'plain' then, 'start' now\. Give the same flags"):
        train(*QUICK, *START, "--resume_from_checkpoint", "latest", "--max_train_steps", "4")


def test_a_plug_in_that_drops_the_units_is_told(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(groups: list, options: object) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for group in groups for p in group["params"]], lr=1.0)

    monkeypatch.setattr(registry.load("optimizers", "sgd"), "build", build)
    with pytest.raises(UserError, match=r"--lora_units start: --optimizer sgd cannot work in them: no group .*unit_sc"):
        train(*QUICK, *START, "--optimizer", "sgd")
