"""Complete runs: the best checkpoint, early stopping and the final measurement."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from dreamlora.data.folder import load_folder
from dreamlora.errors import UserError
from dreamlora.eval_loss.evalset import EvalSet
from dreamlora.eval_loss.items import ItemLosses
from dreamlora.eval_loss.selection import candidates, select
from dreamlora.runfolder import RunFolder
from tests.training.conftest import flags_of, train_with
from tests.training.test_resume import assert_equal_runs
from tests.training.test_run import same, weights

Train = Callable[..., RunFolder]
OFTEN = ["--eval_steps", "1", "--sample_steps", "0"]
RISING = ["--learning_rate", "2", "--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "5"]
TOO_FAST = ["--eval_steps", "1", *RISING, "--checkpointing_steps", "1"]
"""The loss falls for three steps, then rises by 3 %: by far more than processors differ in rounding."""


@pytest.fixture(scope="module")
def whole(photos: Path, cache: Path, sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run whose best step is not its last; not to be written to."""
    run = train_with([*flags_of(photos, cache, sd_folder, tmp_path_factory.mktemp("whole") / "run"), *TOO_FAST])
    assert 0 < run.selection()["step"] < 6, "the losses of this run must have their lowest before the end"
    return run


def finals(run: RunFolder, name: str = "eval/final_loss") -> dict[int, float]:
    return {row["step"]: row["value"] for row in run.metrics() if row["name"] == name}


def test_the_best_checkpoint_is_kept_and_loads_in_diffusers(whole: RunFolder, sd_folder: Path) -> None:
    chosen = whole.selection()
    best, lora = chosen["step"], whole.lora_file.name
    assert same(load_file(whole.best / lora), load_file(whole.checkpoint_dir(best) / lora))
    expected = select(ItemLosses.load(whole.eval_items_file), "eval/loss")
    assert expected is not None and {**expected.facts, "best_product": None} == chosen
    assert json.loads(whole.summary_file.read_text(encoding="utf-8"))["best"] == chosen
    pipeline = StableDiffusionPipeline.from_pretrained(sd_folder)
    pipeline.load_lora_weights(whole.best)
    assert pipeline.get_active_adapters()
    for page in (
        whole.report_html.read_text(encoding="utf-8"),
        whole.report_md.read_text(encoding="utf-8").replace("\\", ""),
    ):
        assert f"Best: step {best}, because it" in page and f"best step, {best}" in page


def test_the_larger_set_is_measured_on_base_best_and_last(whole: RunFolder, train: Train) -> None:
    best = whole.selection()["step"]
    assert list(finals(whole)) == [0, best, 6]
    items = EvalSet.load(whole.final_evalset_file)
    table = ItemLosses.load(whole.final_items_file)
    assert table.evalset_id == items.id and len(items.times) == 32
    assert {step: pytest.approx(table.mean(step)) for step in table.steps} == finals(whole)
    assert finals(whole, "eval/final_loss_rel")[best] == pytest.approx((table.rows[best] / table.rows[0]).mean())
    # the best step is measured with other weights in the model: a run that ends there must give the same values
    ends_there = train(*TOO_FAST, "--max_train_steps", str(best))
    assert finals(ends_there)[best] == finals(whole)[best]
    assert finals(ends_there, "eval/gap") == {step: finals(whole, "eval/gap")[step] for step in (0, best)}


def test_the_gap_is_the_held_out_loss_minus_that_of_training_images(
    whole: RunFolder, train: Train, photos: Path, tmp_path: Path
) -> None:
    """A run on nothing but the seven images that were not held out measures them as eval/loss_train."""
    (key, *_) = json.loads(whole.evalset_file.read_text(encoding="utf-8"))["noise_keys"]
    kept = [record for record in load_folder(photos, "a").records if record.content_hash() not in key]
    assert len(kept) == 7
    (tmp_path / "seven").mkdir()
    for record in kept:
        shutil.copy(record.where, tmp_path / "seven")
    run = train(*OFTEN, "--max_train_steps", "1", "--holdout", "0", "--instance_data_dir", str(tmp_path / "seven"))
    assert not finals(run, "eval/gap"), "nothing was held out"
    assert finals(whole, "eval/gap")[0] == pytest.approx(finals(whole)[0] - finals(run, "eval/loss_train")[0], abs=1e-6)
    assert finals(whole, "eval/gap")[6] != finals(whole, "eval/gap")[0]


def test_the_evaluation_set_is_stored_so_that_other_runs_can_be_measured_on_it(
    whole: RunFolder, tmp_path: Path
) -> None:
    items = EvalSet.load(whole.evalset_file)
    assert {row["evalset_id"] for row in whole.metrics() if row["name"] == "eval/loss"} == {items.id}
    for file in (whole.evalset_file, whole.evalset_tensors):
        shutil.copy(file, tmp_path)
    about = json.loads((tmp_path / "evalset.json").read_text(encoding="utf-8"))
    other = ["another"] * len(about["captions"])
    (tmp_path / "evalset.json").write_text(json.dumps({**about, "captions": other}), encoding="utf-8")
    with pytest.raises(UserError, match="do not belong together"):
        EvalSet.load(tmp_path / "evalset.json")
    (tmp_path / "evalset.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="not a safetensors file"):
        EvalSet.load(tmp_path / "evalset.json")


@pytest.mark.parametrize("step", [1, 5])
def test_every_checkpoint_goes_on_to_the_same_best(
    whole: RunFolder, train: Train, step: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Step 1 needs weights that later steps have ruled out."""
    assert 1 not in candidates(ItemLosses.load(whole.eval_items_file))
    resumed = train(*TOO_FAST, "--resume_from_checkpoint", str(whole.checkpoint_dir(step)))
    assert "cannot become the best checkpoint" not in caplog.text, "no weights are missing"
    assert_equal_runs(whole, resumed)
    assert np.array_equal(*(np.load(run.final_items_file)["items"] for run in (whole, resumed)))


@pytest.mark.parametrize("init", ["gaussian", "pissa"])
def test_a_resumed_run_with_another_larger_set_measures_the_base_model_on_it(
    init: str, train: Train, tmp_path: Path
) -> None:
    """A run that goes on to more steps may afford more items."""
    flags = [*OFTEN, "--init", init, "--max_train_steps", "2", "--checkpointing_steps", "1"]
    run = train(*flags, "--final_eval_items", "32")
    more = [*flags[:-4], "--max_train_steps", "3", "--final_eval_items", "64"]
    resumed = train(*more, "--resume_from_checkpoint", "latest")
    whole = train(*more, "--output_dir", str(tmp_path / "whole"))
    assert len(finals(run)) == len(finals(whole)) and same(weights(resumed), weights(whole))
    (first, second) = (ItemLosses.load(one.final_items_file) for one in (resumed, whole))
    assert first.evalset_id == second.evalset_id and len(first.rows[0]) == 64
    assert np.allclose(first.rows[0], second.rows[0], rtol=1e-5) and np.array_equal(first.rows[3], second.rows[3])


def test_weights_that_are_gone_cannot_be_selected(
    whole: RunFolder, train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(whole.path, tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    shutil.rmtree(run.candidates)
    train(*TOO_FAST, "--max_train_steps", "7", "--resume_from_checkpoint", "latest")
    assert "cannot become the best checkpoint" in caplog.text
    assert run.selection()["step"] == 7


def test_selecting_and_measuring_leave_the_training_as_it_is(whole: RunFolder, train: Train) -> None:
    plain = train(*TOO_FAST, "--no_save_best", "--final_eval_items", "0", "--sample_steps", "0")
    assert same(weights(whole), weights(plain))
    assert not (plain.best.exists() or plain.candidates.exists() or plain.final_items_file.exists() or finals(plain))


def test_early_stopping_says_why_and_can_be_taken_back(train: Train) -> None:
    still = ["--eval_steps", "1", "--sample_steps", "5", "--learning_rate", "0"]
    run = train(*still, "--early_stopping", "2")
    summary = json.loads(run.summary_file.read_text(encoding="utf-8"))
    told = "Stopped early at step 2 of 6: eval/loss has not clearly fallen below the base model's for 2 evaluations"
    assert told in summary["ended_early"] and "--early_stopping (now 2)" in summary["ended_early"]
    assert told.replace("'", "&#39;") in run.report_html.read_text(encoding="utf-8")
    assert run.checkpoint_steps() == [2] and run.sample_dir(2).exists(), "the last step is the last for all"
    assert max(row["step"] for row in run.metrics()) == 2

    train(*still, "--early_stopping", "2", "--resume_from_checkpoint", "latest")
    assert json.loads(run.summary_file.read_text(encoding="utf-8"))["ended_early"] == summary["ended_early"]
    assert run.checkpoint_steps() == [2]

    train(*still, "--resume_from_checkpoint", "latest")
    assert json.loads(run.summary_file.read_text(encoding="utf-8"))["ended_early"] is None
    assert max(row["step"] for row in run.metrics()) == 6


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(whole: RunFolder, train: Train) -> None:
    run = train(*TOO_FAST, "--early_stopping", "1", "--sample_steps", "0")
    assert max(row["step"] for row in run.metrics()) < 6, "the losses of this test must rise"
    train(*TOO_FAST, "--resume_from_checkpoint", "latest", "--sample_steps", "0")
    assert same(weights(whole), weights(run))


def test_early_stopping_needs_evaluations(train: Train) -> None:
    with pytest.raises(UserError, match="--early_stopping needs evaluations"):
        train("--eval_steps", "0", "--early_stopping", "2")
