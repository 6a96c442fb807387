"""``--learning_rate auto``: a rate is found and recorded, and nothing else is otherwise than if it had been given."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dreamlora.__main__ import dispatch
from dreamlora.errors import DivergedError, UserError
from dreamlora.eval_loss import rates
from dreamlora.eval_loss.evalset import EvalSet
from dreamlora.eval_loss.items import ItemLosses
from dreamlora.run import provenance, range_test
from dreamlora.run.opening import begin
from dreamlora.runfolder import RunFolder
from dreamlora.training import loop, state
from tests.training.conftest import train_with
from tests.training.forked import in_two_processes
from tests.training.test_resume import assert_equal_runs, interrupt_after
from tests.training.test_run import same, weights

pytestmark = pytest.mark.usefixtures("no_report")

Train = Callable[..., RunFolder]
AUTO = ["--learning_rate", "auto"]


def found(run: RunFolder) -> dict[str, Any]:
    """The record, of which nothing may be unreadable."""
    assert not run.damage()
    return run.range_test()


def options(run: RunFolder) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(run.config_file.read_text(encoding="utf-8"))
    return content


def last_state(run: RunFolder) -> dict[str, Any]:
    return state.open_checkpoint(run.checkpoint_dir(run.checkpoint_steps()[-1])).state


@pytest.mark.parametrize(
    "more",
    [
        "",
        "--optimizer scaled_adamw --lora_dropout 0.2 --lr_scheduler cosine --lr_warmup_steps 2 --ema_decay 0.9",
        "--optimizer lora_muon --gradient_accumulation_steps 2 --train_text_encoder --text_encoder_lr 1e-3",
        "--optimizer schedulefree_adamw --train_text_encoder",
        "--optimizer scaled_adamw --lora_units start --init pissa --ema_decay 0.9",
        "--optimizer sgd --init pissa --eval_steps 0 --sample_steps 0 --checkpointing_steps 6",
        "--optimizer lion --new_tokens sks --holdout 0",
    ],
    ids=lambda words: "-".join(words.split()[1:4:2]) or "adamw",
)
def test_the_run_is_that_of_the_rate_it_found(more: str, train: Train, tmp_path: Path) -> None:
    own = more.split()
    one = train(*own, *AUTO, "--output_dir", str(tmp_path / "auto" / "run"))
    rate = found(one)["learning_rate"]
    two = train(*own, "--learning_rate", str(rate), "--output_dir", str(tmp_path / "given" / "run"))
    assert same(weights(one), weights(two)) and options(one) == options(two)
    if "--eval_steps" not in more:
        assert_equal_runs(one, two)
    first, second = map(last_state, (one, two))
    assert json.dumps(first["lr_scheduler"]) == json.dumps(second["lr_scheduler"])
    for index, entries in first["optimizer"]["state"].items():
        for name, value in entries.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(second["optimizer"]["state"][index][name]))
    assert not two.range_test()


def test_the_record_tells_what_was_tried(train: Train, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run = train(*AUTO, "--lr_scheduler", "cosine", "--lr_warmup_steps", "0")
    record = found(run)
    tried = record["tried"]
    assert record["metric"] == "eval/loss" and record["steps"] == 6, "no longer than the run itself"
    assert [row["learning_rate"] for row in tried] == sorted(row["learning_rate"] for row in tried)
    assert len(tried) >= rates.USUAL and record["share"] > 0
    assert record["n"] == rates.ITEMS and record["length"] == pytest.approx(3.5), (
        "a cosine counts half, and its first step"
    )
    items = EvalSet.load(run.evalset_file).subset(rates.ITEMS, 1234, "range test")
    assert record["evalset_id"] == items.id != EvalSet.load(run.evalset_file).id
    losses = ItemLosses.load(run.eval_items_file).rows[0]
    chosen = [EvalSet.load(run.evalset_file).noise_keys.index(key) for key in items.noise_keys]
    assert record["start"] == pytest.approx(losses[chosen].mean(), rel=1e-6), "some of the curve's items"
    assert record["reason"] in caplog.text and "learning rate auto" in caplog.text
    assert f"learning rate {record['learning_rate']:g}" in run.outline()["optimizer"]
    assert run.summary()["timings"]["learning rate test"] > 0


def test_what_an_optimizer_warns_of_is_told_once(train: Train, caplog: pytest.LogCaptureFixture) -> None:
    train(*AUTO, "--optimizer", "peft_riemannian", "--lora_layers", "to_q,conv1", "--max_train_steps", "2")
    assert caplog.text.count("peft_riemannian passes over convolutions") == 1


def test_a_resumed_run_has_the_rate_and_makes_no_second_test(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(*AUTO, "--output_dir", str(tmp_path / "whole" / "run"))
    stopped = ("--output_dir", str(tmp_path / "stopped" / "run"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(range_test, "settle", settled_then_stopped(patch, range_test.settle))
        train(*AUTO, *stopped)
    record = (tmp_path / "stopped" / "run" / "learning_rate_test.json").read_bytes()
    monkeypatch.setattr(range_test, "settle", never)
    resumed = train(*AUTO, *stopped, "--resume_from_checkpoint", "latest")
    assert_equal_runs(whole, resumed)
    assert resumed.range_test_file.read_bytes() == record
    again = train(*AUTO, *stopped, "--resume_from_checkpoint", "latest")
    assert same(weights(again), weights(resumed)), "it is complete"
    elsewhere = str(resumed.checkpoint_dir(4))
    adopted = train(*AUTO, "--output_dir", str(tmp_path / "third"), "--resume_from_checkpoint", elsewhere)
    assert same(weights(whole), weights(adopted)) and adopted.range_test() == resumed.range_test()


def settled_then_stopped(patch: pytest.MonkeyPatch, settle: Callable[..., None]) -> Callable[..., None]:
    """The test as it is; the run itself gets a Ctrl-C at its fifth step."""

    def both(*args: Any) -> None:
        settle(*args)
        interrupt_after(patch, 4)

    return both


def never(*args: Any) -> None:
    pytest.fail("a second test")


def test_a_run_that_was_stopped_before_its_first_checkpoint_is_tested_anew(train: Train, tmp_path: Path) -> None:
    run = train(*AUTO, "--checkpointing_steps", "0")
    for file in (run.summary_file, run.lora_file):
        file.unlink()
    config = options(run)
    run.config_file.write_text(yaml.safe_dump(config | {"learning_rate": 0.5}), encoding="utf-8")
    again = train(*AUTO, "--resume_from_checkpoint", "latest")
    assert found(again)["learning_rate"] == config["learning_rate"] == options(again)["learning_rate"]


def killed_before_it_began(train: Train, patch: pytest.MonkeyPatch, *more: str) -> None:
    """A run that ends when all is ready for its first step, and nothing says yet that there is a run."""

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with patch.context() as once, pytest.raises(KeyboardInterrupt):
        once.setattr(provenance, "write_config", killed)
        train(*more)


@pytest.mark.parametrize("more", ["", "--resume_from_checkpoint latest"], ids=["anew", "resumed"])
def test_nothing_is_left_of_a_test_whose_run_did_not_begin(
    more: str, train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place, short = ("--output_dir", str(tmp_path / "place")), ("--max_train_steps", "2", "--sample_steps", "0")
    killed_before_it_began(train, monkeypatch, *AUTO, *place, *short)
    assert (tmp_path / "place" / "learning_rate_test.json").exists()
    run = train("--learning_rate", "1e-3", *place, *short, *more.split())
    assert not run.range_test() and options(run)["learning_rate"] == 1e-3


def test_nothing_is_left_of_a_run_that_was_to_go_on_elsewhere(
    train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = train("--max_train_steps", "4", "--sample_steps", "0")
    place = ("--output_dir", str(tmp_path / "place"))
    killed_before_it_began(train, monkeypatch, *place, "--resume_from_checkpoint", str(first.checkpoint_dir(4)))
    assert RunFolder(tmp_path / "place").metrics()
    run = train("--max_train_steps", "4", "--sample_steps", "0", "--learning_rate", "1e-3", *place)
    rows = [row for row in run.metrics() if row["name"] == "eval/loss" and row["step"] == 0]
    assert len(rows) == 1


def test_two_processes_agree(flags: list[str], tmp_path: Path) -> None:
    quick = [*flags, *AUTO, "--sample_steps", "0", "--checkpointing_steps", "0", "--final_eval_items", "0"]
    one = train_with([*quick, "--train_batch_size", "2", "--output_dir", str(tmp_path / "one")])
    two = RunFolder(tmp_path / "two")
    assert in_two_processes(lambda: train_with([*quick, "--train_batch_size", "1", "--output_dir", str(two.path)])) == [
        0,
        0,
    ]
    first, second = found(one), found(two)
    assert second["learning_rate"] == pytest.approx(first["learning_rate"], rel=1e-2)
    values = [[row["value"] for row in record["tried"]] for record in (first, second)]
    assert values[0] == pytest.approx(values[1], rel=1e-2), "a high rate makes much of rounding"


def test_what_follows_the_rate_follows_it_and_what_has_its_own_keeps_it(flags: list[str]) -> None:
    def open_rates(*more: str) -> tuple[Any, Any, Any]:
        from accelerate.state import AcceleratorState

        from dreamlora.cli.parse import parse_run

        AcceleratorState._reset_state(reset_partial_state=True)
        context = begin(parse_run([*flags, *AUTO, *more])[0])
        optim = context.config.optim
        return context.open_rates, optim.learning_rate, optim.text_encoder_lr

    assert open_rates() == (("learning_rate",), 1e-4, None)
    assert open_rates("--train_text_encoder") == (("learning_rate", "text_encoder_lr"), 1e-4, 1e-4)
    assert open_rates("--train_text_encoder", "--text_encoder_lr", "1e-3") == (("learning_rate",), 1e-4, 1e-3)


def test_without_held_out_images_it_measures_on_training_images(train: Train) -> None:
    run = train(*AUTO, "--holdout", "0", "--eval_steps", "0", "--sample_steps", "0", "--checkpointing_steps", "0")
    assert found(run)["metric"] == "eval/loss_train" and found(run)["n"] == rates.ITEMS


def test_the_scaler_of_fp16_is_as_it_was(train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain = found(train(*AUTO, "--output_dir", str(tmp_path / "plain")))
    settle = range_test.settle

    def scaled(context: Any, run: Any, *more: Any) -> None:
        run.accelerator.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
        before = scaler.state_dict()
        settle(context, run, *more)
        assert run.accelerator.scaler is scaler and scaler.state_dict() == before
        assert not scaler._per_optimizer_states
        run.accelerator.scaler = None

    monkeypatch.setattr(range_test, "settle", scaled)
    skipping = found(train(*AUTO, "--output_dir", str(tmp_path / "scaled")))
    values = [[row["value"] for row in record["tried"]] for record in (plain, skipping)]
    assert len(values[0]) == len(values[1]) and None not in values[1]


def test_where_nothing_holds_the_rate_is_that_of_a_run_without_a_test(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = loop.optimizer_step

    def breaks(run: loop.Run, batches: Any) -> Any:
        if run.average is None and run.config.optim.lr_scheduler == "constant" and not run.callbacks:
            raise DivergedError("at once")
        return original(run, batches)

    monkeypatch.setattr(loop, "optimizer_step", breaks)
    run = train(*AUTO, "--sample_steps", "0")
    record = found(run)
    assert record["learning_rate"] == options(run)["learning_rate"] == 1e-4
    assert "cannot tell" in record["reason"] and all(row["value"] is None for row in record["tried"])
    assert len(record["tried"]) == rates.MOST


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (
            "--learning_rate auto --optimizer prodigy",
            "--learning_rate auto: --optimizer prodigy finds its rate by itself",
        ),
        ("--learning_rate auto --scale_lr", "--scale_lr multiplies a learning rate that is given"),
        ("--learning_rate automatic", "--learning_rate takes a number or auto (got 'automatic')"),
        ("--text_encoder_lr auto --train_text_encoder", "--text_encoder_lr takes a number (got 'auto')"),
    ],
)
def test_what_cannot_be_meant(more: str, told: str, train: Train) -> None:
    with pytest.raises(UserError) as caught:
        train(*more.split())
    assert told in str(caught.value)


def test_no_case_matters_and_a_dry_run_makes_no_test(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(range_test, "settle", never)
    assert dispatch(["dreambooth", *flags, "--learning_rate", "AUTO", "--dry_run"]) is None
    assert "dry run" in capsys.readouterr().out and not (tmp_path / "run").exists()
