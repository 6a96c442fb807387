"""Optimizers through the real training program: they learn, and a resumed run equals the uninterrupted one.

The four that are not here are used by test_run.py and test_resume.py.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest

from dreamlora import registry
from dreamlora.cli.parse import parse_run
from dreamlora.errors import UserError
from dreamlora.runfolder import RunFolder
from tests.training.test_run import same, values, weights

Train = Callable[..., RunFolder]
ELSEWHERE = {"adamw", "sgd", "scaled_gd", "scaled_adamw"}
RATES = {"prodigy": "1", "lora_muon": "3e-2", "lora_tsd": "3e-2"}
"""Others take that of the flags fixture."""
QUICK = [
    *("--max_train_steps", "3", "--sample_steps", "0", "--checkpointing_steps", "2", "--eval_steps", "3"),
    *("--lora_layers", "all"),
]


def flags_of(name: str) -> list[str]:
    """Command-line flags; skips where the optimizer's package is missing."""
    try:
        registry.check_needs("optimizers", name)
    except UserError as error:
        pytest.skip(str(error))
    more = ["--optimizer_args", "d0", "1e-3"] if name == "prodigy" else []
    rate = ["--learning_rate", RATES[name]] if name in RATES else []
    return ["--optimizer", name, *rate, *more, *QUICK]


@pytest.fixture(autouse=True)
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes after training, and the giving back of memory, is not of interest here and takes longer."""
    from dreamlora.run import ending

    monkeypatch.setattr(gc, "collect", lambda: 0)
    monkeypatch.setattr(ending, "_expected_output", lambda *_: "not of interest")
    monkeypatch.setattr(ending, "finish", lambda *_: None)


@pytest.mark.parametrize("name", sorted(set(registry.names("optimizers")) - ELSEWHERE))
def test_every_optimizer_lowers_the_loss_and_resumes_exactly(name: str, train: Train, tmp_path: Path) -> None:
    flags = flags_of(name)
    whole = train(*flags, "--output_dir", str(tmp_path / "whole"))
    losses = [row["value"] for row in whole.metrics() if row["name"] == "eval/loss"]
    assert losses[-1] < losses[0]
    resumed = train(
        *flags, "--output_dir", str(tmp_path / "resumed"), "--resume_from_checkpoint", str(whole.checkpoint_dir(2))
    )
    assert same(weights(whole), weights(resumed))
    assert values(whole) == values(resumed)


def test_schedule_free_measures_and_saves_the_average(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("schedulefree")
    import torch

    from dreamlora.training import state

    seen = {}
    original = state.save_lora

    def spy(run, folder):
        optimizer = run.optimizer.optimizer
        modes = [group["train_mode"] for group in optimizer.param_groups]
        seen[run.step] = (modes, [p.detach().clone() for p in run.trainables.values()])
        optimizer.train()
        trained = [p.detach().clone() for p in run.trainables.values()]
        optimizer.eval()
        assert run.step == 1 or any(not torch.equal(x, y) for x, y in zip(seen[run.step][1], trained, strict=True))
        return original(run, folder)

    monkeypatch.setattr(state, "save_lora", spy)
    train(*flags_of("schedulefree_adamw"))
    assert sorted(seen) == [2, 3] and not any(mode for modes, _ in seen.values() for mode in modes)


def test_a_missing_package_is_named_before_anything_is_loaded(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'--optimizer prodigy: .* prodigyopt: pip install "dreamlora\[prodigy\]"'):
        parse_run([*flags, "--optimizer", "prodigy"])
    with pytest.raises(UserError, match=r"bitsandbytes or torchao"):
        parse_run([*flags, "--optimizer", "AdamW8bit"])


def test_what_the_optimizer_clips_is_in_the_log(train: Train) -> None:
    tight = ["--optimizer_args", "clip_unmagnified_grad", "1e-9", "update_skipping", "1e9"]
    run = train(*flags_of("lora_rite"), *tight)
    counted = [(row["step"], row["name"], row["value"]) for row in run.metrics() if row["name"].startswith("optimizer")]
    assert counted == [(3, "optimizer/clipped", 3.0)]  # at the end
