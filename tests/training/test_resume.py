"""A resumed run ends with exactly what the uninterrupted one has."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from dreamlora.errors import UserError
from dreamlora.runfolder import RunFolder
from dreamlora.training import state
from tests.hubcache import FakeHub
from tests.training.test_run import same, values, weights

pytestmark = pytest.mark.usefixtures("no_report")

Train = Callable[..., RunFolder]
HARD = ["--optimizer", "scaled_adamw", "--lora_dropout", "0.2", "--lr_scheduler", "cosine", "--lr_warmup_steps", "2"]


def pictures(run: RunFolder) -> dict[str, bytes]:
    return {str(file.relative_to(run.samples)): file.read_bytes() for file in run.samples.rglob("*.png")}


def best(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(run.best / run.lora_file.name)


def assert_equal_runs(first: RunFolder, second: RunFolder) -> None:
    assert same(weights(first), weights(second))
    assert values(first) == values(second)
    assert first.selection() == second.selection() and same(best(first), best(second))
    assert pictures(first) == pictures(second)
    assert first.grid_file.read_bytes() == second.grid_file.read_bytes()


def interrupt_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Ctrl-C when the step's update was made, before anything of it was written."""
    from dreamlora.training import loop

    original = loop.optimizer_step

    def stop(run, batch):
        if run.step == step:
            raise KeyboardInterrupt
        return original(run, batch)

    monkeypatch.setattr(loop, "optimizer_step", stop)


@pytest.mark.parametrize("step", [3, 5])
def test_resumed_equals_uninterrupted(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    whole = train(*HARD, "--output_dir", str(tmp_path / "whole" / "run"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, step)
        train(*HARD)
    resumed = train(*HARD, "--resume_from_checkpoint", "latest")
    assert_equal_runs(whole, resumed)


def test_killed_while_a_checkpoint_is_written(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dreamlora.training import state

    whole = train("--output_dir", str(tmp_path / "whole" / "run"))

    def half(payload, file):
        file.write(b"half a file")
        if "000004" in getattr(file, "name", ""):
            raise KeyboardInterrupt
        file.seek(0)
        original(payload, file)

    original = torch.save
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(state.torch, "save", half)
        train()
    run = RunFolder(tmp_path / "run")
    assert run.checkpoint_steps() == [2]
    assert_equal_runs(whole, train("--resume_from_checkpoint", "latest"))


def test_sigkill_at_any_moment(flags: list[str], train: Train, tmp_path: Path) -> None:
    """Three times killed at arbitrary moments, then left alone."""
    whole = train("--output_dir", str(tmp_path / "whole" / "run"))
    run = RunFolder(tmp_path / "run")
    command = [sys.executable, "-m", "dreamlora", "dreambooth", *flags]
    for attempt, reached in enumerate((1, 3, 5)):
        more = ["--resume_from_checkpoint", "latest"] if run.checkpoint_steps() else ["--overwrite_output_dir"]
        process = subprocess.Popen(
            [*command, *more], env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if any(row["step"] >= reached for row in run.metrics() if row["name"] == "train/loss"):
                break
            time.sleep(0.002 * (attempt + 1))
        process.send_signal(signal.SIGKILL)
        process.wait()
    if run.checkpoint_steps():
        assert_equal_runs(whole, train("--resume_from_checkpoint", "latest"))


def test_a_branch_of_the_hub_that_moved_is_refused_and_the_commit_can_be_given(
    train: Train, sd_folder: Path, tmp_path: Path
) -> None:
    first, second = "1" * 40, "2" * 40
    hub = FakeHub(tmp_path / "hub")
    hub.commit("owner/name", first, sd_folder)
    quick = ["--max_train_steps", "2", "--sample_steps", "0", "--eval_steps", "0"]
    run = train(*quick, "--pretrained_model_name_or_path", "owner/name", "--cache_dir", str(hub.cache))
    assert run.base_model() == {"id": f"owner/name@{first}", "revision": first, "vae_revision": None}
    hub.commit("owner/name", second, sd_folder)
    again = [*quick, "--pretrained_model_name_or_path", "owner/name", "--cache_dir", str(hub.cache)]
    again += ["--max_train_steps", "3", "--resume_from_checkpoint", "latest"]
    with pytest.raises(UserError, match=f"base model: 'owner/name@{first}' then, 'owner/name@{second}' now"):
        train(*again)
    assert train(*again, "--revision", first).checkpoint_steps()[-1] == 3


def test_other_settings_are_refused_by_name(train: Train, flux_folder: Path) -> None:
    train("--max_train_steps", "2")
    with pytest.raises(UserError, match=r"rank: 2 then, 4 now"):
        train("--max_train_steps", "2", "--resume_from_checkpoint", "latest", "--rank", "4")
    with pytest.raises(UserError, match=r"global batch size: 4 then, 2 now"):
        train("--resume_from_checkpoint", "latest", "--train_batch_size", "2")
    with pytest.raises(UserError, match="base model"):
        train("--resume_from_checkpoint", "latest", "--pretrained_model_name_or_path", str(flux_folder))


def test_a_longer_run_goes_on_from_a_finished_one(train: Train, tmp_path: Path) -> None:
    whole = train("--output_dir", str(tmp_path / "whole" / "run"), "--checkpointing_steps", "2")
    train("--max_train_steps", "4")
    told = ["--save_format", "kohya", "--metadata_title", "another"]
    longer = train("--resume_from_checkpoint", "latest", *told)
    assert same(weights(whole), weights(longer)) and longer.exported("kohya").exists()
    told[-1] = "a third"  # of what is complete
    train("--resume_from_checkpoint", "latest", *told)
    with safe_open(longer.lora_file, "pt") as opened:
        assert opened.metadata()["modelspec.title"] == "a third"


def test_checkpoints_rotate(train: Train) -> None:
    assert train("--checkpoints_total_limit", "2").checkpoint_steps() == [4, 6]


def test_where_there_is_no_checkpoint_yet_latest_begins(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """In a new folder, and where a run was stopped before its first checkpoint: what that left is gone."""
    caplog.set_level(logging.INFO)
    whole = train("--output_dir", str(tmp_path / "whole" / "run"), "--resume_from_checkpoint", "latest")
    assert "the training begins" in caplog.text
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 1)
        train()
    (tmp_path / "run" / "samples" / "step_000099").mkdir()
    begun = train("--resume_from_checkpoint", "latest")
    assert_equal_runs(whole, begun)
    assert not begun.sample_dir(99).exists()


def test_a_complete_run_has_nothing_to_resume(
    train: Train, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """So that a job which is queued again and again ends well; other steps or settings are another matter."""
    from dreamlora.run import assemble

    caplog.set_level(logging.INFO)
    quick = ["--max_train_steps", "2", "--checkpointing_steps", "0"]
    run = train(*quick, "--resume_from_checkpoint", "latest")
    before = run.metrics_file.read_bytes(), run.lora_file.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(assemble, "_build", lambda *_: pytest.fail("a model was loaded"))
        assert train(*quick, "--resume_from_checkpoint", "latest").path == run.path
    assert "is complete (2 steps)" in caplog.text and "give a larger --max_train_steps" in caplog.text
    for more in (["--rank", "4"], ["--max_train_steps", "3"]):
        with pytest.raises(UserError, match="no checkpoint to go on from"):
            train(*quick, *more, "--resume_from_checkpoint", "latest")
    assert (run.metrics_file.read_bytes(), run.lora_file.read_bytes()) == before


def test_a_complete_run_whose_schedule_has_ended_is_trained_further_as_another(
    train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    """With more steps the rates of its steps would have been others, so that is refused."""
    caplog.set_level(logging.INFO)
    cosine = ["--lr_scheduler", "cosine", "--resume_from_checkpoint", "latest"]
    run = train(*cosine, "--max_train_steps", "2")
    train(*cosine, "--max_train_steps", "2")
    assert "is complete (2 steps)" in caplog.text and f"--init_lora {run.path}" in caplog.text
    with pytest.raises(UserError, match="max_train_steps: 2 then, 3 now"):
        train(*cosine, "--max_train_steps", "3")


def test_damaged_side_files_are_made_anew(train: Train) -> None:
    run = train("--max_train_steps", "3")
    before = weights(run), run.selection()
    for file in (run.selection_file, run.outline_file, run.base_model_file, run.evalset_file, run.summary_file):
        file.write_bytes(file.read_bytes()[:-9])
    run.lora_file.unlink()
    train("--max_train_steps", "3", "--resume_from_checkpoint", "latest")
    assert same(before[0], weights(run)) and run.selection() == before[1] and run.damage() == []


def test_a_run_whose_lora_has_gone_is_not_complete(train: Train) -> None:
    run = train("--max_train_steps", "2")
    before = weights(run)
    run.lora_file.unlink()
    assert same(before, weights(train("--max_train_steps", "2", "--resume_from_checkpoint", "latest")))


def test_latest_is_the_newest_checkpoint_that_is_sound(train: Train, caplog: pytest.LogCaptureFixture) -> None:
    run = train()
    before = weights(run)
    run.summary_file.unlink()
    (run.checkpoint_dir(6) / "training_state.pt").write_bytes(b"damaged")
    assert same(before, weights(train("--resume_from_checkpoint", "latest")))
    assert "step-000006 is no checkpoint that can be read" in caplog.text


def test_if_no_checkpoint_is_sound_that_is_told_and_nothing_is_lost(train: Train) -> None:
    run = train("--max_train_steps", "2")
    before = weights(run)
    (run.checkpoint_dir(2) / "settings.json").write_bytes(b"[")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read"):
        train("--resume_from_checkpoint", "latest")
    with pytest.raises(UserError, match=r"step-000002 is no checkpoint that can be read"):
        train("--resume_from_checkpoint", "step-000002")
    with pytest.raises(UserError, match=r"no checkpoint there\. In .*: step-000002"):
        train("--resume_from_checkpoint", "step-000004")
    assert same(before, weights(run))


def test_an_optimizer_state_of_another_rank_is_refused(train: Train) -> None:
    file = train().checkpoint_dir(6) / "training_state.pt"
    saved = torch.load(file, weights_only=True)
    for entry in saved["optimizer"]["state"].values():
        entry["exp_avg"] = torch.cat([entry["exp_avg"], entry["exp_avg"]])
    torch.save(saved, file)
    with pytest.raises(UserError, match=r"cannot go on from there: .*exp_avg of .*\.lora_A is .*another rank"):
        train("--resume_from_checkpoint", "latest", "--max_train_steps", "8")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_checkpoint_that_may_be_whole_is_not_to_be_removed(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    folder = RunFolder(tmp_path)
    (folder.checkpoint_dir(2)).mkdir(parents=True)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=f"cannot read .*{os.strerror(number)}") as error:
        state.find_checkpoint(folder, "latest", lambda checkpoint: None)
    assert "remove" not in str(error.value)


def test_a_checkpoint_of_another_folder_brings_its_history_along(train: Train, tmp_path: Path) -> None:
    whole = train("--output_dir", str(tmp_path / "whole" / "run"))
    resumed = train(
        "--output_dir", str(tmp_path / "copy" / "run"), "--resume_from_checkpoint", str(whole.checkpoint_dir(4))
    )
    assert_equal_runs(whole, resumed)


def test_what_changed_of_the_images_is_named(train: Train, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    flags = ["--max_train_steps", "2", "--instance_data_dir", str(folder), "--holdout", "0", "--sample_steps", "0"]
    run = train(*flags)
    rows = run.image_rows()
    assert [(row["name"], row["role"], row["captions"]) for row in rows] == [
        (f"{number}.png", "trained", ["a photo of sks dog"]) for number in range(8)
    ]

    def refused() -> str:
        with pytest.raises(
            UserError, match=r"images or captions are others than when .*step-000002 was written"
        ) as error:
            train(*flags, "--resume_from_checkpoint", "latest")
        return str(error.value)

    for number in range(5):
        (folder / f"{number}.txt").write_text(f"another {number}", encoding="utf-8")
    assert (
        "(another caption: 0.png ('a photo of sks dog' then, 'another 0' now), 1.png ('a photo of sks dog' then, "
        "'another 1' now), 2.png ('a photo of sks dog' then, 'another 2' now) and 2 more)" in refused()
    )
    for number in range(5):
        (folder / f"{number}.txt").unlink()
    Image.new("RGB", (20, 20), "red").save(folder / "8.png")
    (folder / "7.png").rename(folder / "07.png")
    (folder / "3.png").unlink()
    Image.new("RGB", (20, 20), "blue").save(folder / "4.png")
    message = refused()
    for part in ("added: 8.png;", "removed: 3.png;", "renamed: 7.png to 07.png", "another picture: 4.png"):
        assert part in message
    assert "another --output_dir" in message
    shutil.rmtree(folder)
    shutil.copytree(photos, folder)
    (folder / "0.png").rename(folder / "9.png")  # the same images in another order, which is another run
    assert "(renamed: 0.png to 9.png)" in refused()
    (folder / "9.png").rename(folder / "0.png")
    train(*flags, "--resume_from_checkpoint", "latest")


def test_an_image_that_is_no_longer_held_out_is_named(train: Train, photos: Path, tmp_path: Path) -> None:
    """One more photo can take the place of another among those that are held out."""
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    flags = ["--max_train_steps", "2", "--instance_data_dir", str(folder), "--sample_steps", "0", "--holdout", "2"]
    rows = train(*flags).image_rows()
    held_out = {row["name"]: row["sha256"] for row in rows if row["role"] == "held out"}
    for red in range(256):  # until the new one's hash is the smallest
        file = folder / "new.png"
        Image.new("RGB", (20, 20), (red, 0, 0)).save(file)
        if hashlib.sha256(file.read_bytes()).hexdigest() < min(held_out.values()):
            break
    last = max(held_out, key=held_out.__getitem__)
    with pytest.raises(UserError, match=rf"added: new.png; no longer held out: {last}\)"):
        train(*flags, "--resume_from_checkpoint", "latest")


def test_other_class_images_are_refused(train: Train, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "class"
    folder.mkdir()
    for number in range(2):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(folder / f"{number}.png")
    flags = ["--max_train_steps", "2", "--sample_steps", "0", "--with_prior_preservation", "--class_prompt", "a dog"]
    flags += ["--class_data_dir", str(folder), "--num_class_images", "2"]
    train(*flags)
    train(*flags, "--resume_from_checkpoint", "latest", "--max_train_steps", "3")
    Image.new("RGB", (20, 20), "green").save(folder / "1.png")
    with pytest.raises(UserError, match=r"class images or their captions are others than when .*step-000003"):
        train(*flags, "--resume_from_checkpoint", "latest", "--max_train_steps", "4")


def test_a_checkpoint_of_an_older_version_fits(train: Train) -> None:
    """It knew fewer options and no class images; what it does not say is as the default is."""
    run = train("--max_train_steps", "2")
    file = run.checkpoint_dir(2) / "settings.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    del settings["max_token_length"]
    settings["save_format"] = []  # compared then
    file.write_text(json.dumps(settings), encoding="utf-8")
    run.images_file.unlink()
    assert train("--max_train_steps", "3", "--resume_from_checkpoint", "latest").checkpoint_steps()[-1] == 3
