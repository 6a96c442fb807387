"""Complete runs: what they leave behind, and what must not change them."""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dreamlora.errors import UserError
from dreamlora.families import sd
from dreamlora.run import ending
from dreamlora.runfolder import RunFolder
from dreamlora.training import loop, parity
from dreamlora.training.loop import Run

Train = Callable[..., RunFolder]


def weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(folder.lora_file)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def values(folder: RunFolder) -> list[tuple]:
    return [(row["step"], row["name"], row["value"]) for row in folder.metrics() if row["name"] != "train/steps_per_s"]


def test_a_run_leaves_everything_the_readme_promises(train: Train) -> None:
    run = train()
    assert run.checkpoint_steps() == [2, 4, 6]
    for file in (run.config_file, run.grid_file, run.timelapse_file, run.report_html, run.report_md, run.summary_file):
        assert file.stat().st_size > 0
    assert sorted(folder.name for folder in run.samples.iterdir() if folder.is_dir()) == [
        "step_000000",
        "step_000003",
        "step_000006",
    ]
    losses = {row["step"]: row["value"] for row in run.metrics() if row["name"] == "eval/loss"}
    assert list(losses) == [0, 3, 6]
    assert losses[6] < losses[0]
    summary = json.loads(run.summary_file.read_text(encoding="utf-8"))
    assert summary["parity"]["max_abs"] <= 1
    assert summary["data"] == {"instance": 7}


@pytest.mark.parametrize("more", ["", "--train_text_encoder --mixed_precision bf16 --eval_metrics drift"])
@pytest.mark.parametrize("family", ["sd", "flux"])
def test_nothing_of_the_model_is_left_when_the_fresh_one_is_loaded(
    family: str, more: str, train: Train, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Two large models do not fit. And DDP's would be the last to hold the process group, see ``assemble.train``."""
    watched, left, copied = [], [], []
    conclude, check = ending.conclude, parity.check

    def watching(context: Any, run: Run, pictures: Any) -> Any:
        parts = [run.model, *run.components.values(), *context.parts.get("vae").values()]
        modules = [part for part in parts if isinstance(part, torch.nn.Module)]
        watched.extend(weakref.ref(tensor) for module in modules for tensor in module.parameters())
        watched.extend(map(weakref.ref, (run, run.model, run.optimizer, run.stream, *run.callbacks)))
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.Module, "cpu", lambda module: copied.append(module))
            return conclude(context, run, pictures)

    def looking(*arguments: Any, **named: Any) -> dict[str, Any]:
        left.append(sum(held() is not None for held in watched))
        return check(*arguments, **named)

    monkeypatch.setattr(ending, "conclude", watching)
    monkeypatch.setattr(parity, "check", looking)
    model = request.getfixturevalue(f"{family}_folder")
    metrics = more.replace("--eval_metrics drift", "--eval_metrics drift --clip_model tiny").split()
    few = ["--max_train_steps", "1", "--sample_steps", "1", "--parity", "full"]
    train(*few, "--pretrained_model_name_or_path", str(model), *metrics)
    assert len(watched) > 50 and left == [0] and not copied


def test_a_family_without_a_text_encoder_to_train_refuses_to(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sd, "TEXT_ENCODERS", ())
    monkeypatch.setattr(sd, "load", lambda *_: pytest.fail("something was loaded"))
    with pytest.raises(UserError, match="--train_text_encoder: the family of StableDiffusionPipeline has no text enc"):
        train("--train_text_encoder", "--text_encoder_lr", "1e-3")


@pytest.mark.parametrize("family", ["sd", "flux"])
@pytest.mark.parametrize(
    "more",
    [
        "--train_text_encoder --optimizer scaled_adamw --lora_layers all --lora_alpha 1",
        "--with_prior_preservation --class_prompt dog --num_class_images 3 --optimizer scaled_gd --random_flip "
        "--gradient_accumulation_steps 2 --mixed_precision bf16 --noise_offset 0.1 --lr_scheduler cosine "
        "--lr_warmup_steps 1 --gradient_checkpointing",
    ],
)
def test_every_family_trains_with_every_switch(
    family: str, more: str, train: Train, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(f"{family}_folder")
    run = train(*more.split(), "--pretrained_model_name_or_path", str(model), "--max_train_steps", "2")
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in weights(run).values())
    assert any("text_encoder" in name for name in weights(run)) == ("--train_text_encoder" in more)
    assert json.loads(run.summary_file.read_text(encoding="utf-8"))["parity"]["psnr_db"] > 30


def test_sampling_evaluating_and_saving_change_nothing(train: Train, tmp_path: Path) -> None:
    busy = train("--lora_dropout", "0.2")
    nothing = [word for event in ("sample", "eval", "checkpointing") for word in (f"--{event}_steps", "0")]
    quiet = train("--lora_dropout", "0.2", "--output_dir", str(tmp_path / "quiet"), *nothing)
    assert same(weights(busy), weights(quiet))


def test_accumulated_micro_batches_equal_one_large_batch(train: Train, tmp_path: Path) -> None:
    # SGD: Adam makes entries whose gradient is all rounding move by as much as the others
    sgd = ["--optimizer", "sgd", "--learning_rate", "0.1", "--max_train_steps", "3"]
    whole = weights(train(*sgd, "--train_batch_size", "4"))
    split = weights(
        train(*sgd, *f"--train_batch_size 2 --gradient_accumulation_steps 2 --output_dir {tmp_path / 'split'}".split())
    )
    for name, tensor in whole.items():
        assert torch.allclose(tensor, split[name], atol=1e-7), name


def test_another_seed_gives_another_lora(train: Train, tmp_path: Path) -> None:
    assert not same(weights(train()), weights(train("--seed", "1", "--output_dir", str(tmp_path / "other"))))


def test_config_yaml_runs_the_same_again(train: Train, tmp_path: Path) -> None:
    first = train()
    again = train("--config", str(first.config_file), "--output_dir", str(tmp_path / "again"))
    assert same(weights(first), weights(again))


def test_a_folder_with_a_run_is_not_overwritten_unless_told_to(train: Train) -> None:
    train("--max_train_steps", "1")
    with pytest.raises(UserError, match=r"holds a run.*--resume_from_checkpoint latest.*--overwrite_output_dir"):
        train("--max_train_steps", "1")
    train("--max_train_steps", "1", "--overwrite_output_dir")


def test_config_yaml_does_not_point_at_its_own_folder(train: Train) -> None:
    text = train("--max_train_steps", "1", "--overwrite_output_dir", "--hub_token", "secret").config_file.read_text(
        encoding="utf-8"
    )
    options = text[text.index("pretrained_model_name_or_path:") :]
    assert "output_dir" not in options
    assert "resume" not in options
    assert "secret" not in text


def test_a_parity_check_that_fails_does_not_lose_the_report(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(parity, "check", out_of_memory)
    run = train("--max_train_steps", "1")
    assert "out of memory" in json.loads(run.summary_file.read_text(encoding="utf-8"))["parity"]["reason"]
    assert run.report_html.exists()


def test_accumulation_set_by_accelerate_does_not_divide_twice(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sgd = ["--optimizer", "sgd", "--max_train_steps", "2", "--sample_steps", "0", "--gradient_accumulation_steps", "2"]
    first = weights(train(*sgd))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    assert same(first, weights(train(*sgd, "--output_dir", str(tmp_path / "b"))))


@pytest.mark.parametrize(("family", "side"), [("sd", 20), ("flux", 24)])
def test_a_size_the_family_cannot_do_is_refused_first(
    family: str, side: int, train: Train, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dreamlora.models import parts

    monkeypatch.setattr(parts.Parts, "get", lambda *_: pytest.fail("a model was loaded"))
    model = request.getfixturevalue(f"{family}_folder")
    with pytest.raises(UserError, match="--resolution must be a multiple of"):
        train("--pretrained_model_name_or_path", str(model), "--resolution", str(side))


def test_files_of_the_user_in_the_output_folder_stay(train: Train, tmp_path: Path) -> None:
    mine = tmp_path / "run" / "samples" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious", encoding="utf-8")
    train("--max_train_steps", "1")
    assert mine.read_text(encoding="utf-8") == "precious"


def test_a_loss_that_is_not_finite_stops_the_run_and_names_what_to_do(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dreamlora.training import loop

    original = loop.micro_batch_loss
    monkeypatch.setattr(
        loop, "micro_batch_loss", lambda run, *batch: original(run, *batch) * (float("nan") if run.step == 4 else 1)
    )
    with pytest.raises(UserError, match=r"loss is not finite at step 5 .*[0-7]\.png.*--learning_rate") as caught:
        train()
    assert "step-000004" in str(caught.value) or "checkpoints" in str(caught.value)


def test_a_broken_image_stops_the_run_before_any_model_is_loaded(
    train: Train, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(photos, tmp_path / "broken")
    (folder / "9.png").write_bytes((photos / "0.png").read_bytes()[:200])
    from dreamlora.models import parts

    get = parts.Parts.get

    def scheduler_alone(self: parts.Parts, role: Any) -> Any:
        return get(self, role) if role == "scheduler" else pytest.fail("a model was loaded")

    monkeypatch.setattr(parts.Parts, "get", scheduler_alone)
    with pytest.raises(UserError, match=r"9\.png"):
        train("--instance_data_dir", str(folder))


def test_a_wrong_layer_is_named_before_class_images_are_made(train: Train, tmp_path: Path) -> None:
    classes = tmp_path / "classes"
    with pytest.raises(UserError, match=r"--lora_layers: no Linear or Conv2d .* 'to_x'"):
        train(
            *("--with_prior_preservation", "--class_prompt", "dog", "--class_data_dir", str(classes)),
            *("--num_class_images", "3", "--lora_layers", "to_x"),
        )
    assert not classes.exists()


def test_the_grid_is_a_picture_with_a_row_per_step(train: Train) -> None:
    run = train("--num_images_per_prompt", "2")
    with Image.open(run.grid_file) as grid:
        grid.load()
        assert min(grid.size) > 100
    with Image.open(run.timelapse_file) as film:
        assert film.n_frames == 3


# --- text to image ---


@pytest.fixture
def captioned(tmp_path: Path) -> Path:
    """Nine pictures of three shapes, with tags."""
    folder = tmp_path / "captioned"
    folder.mkdir()
    pixels = np.random.default_rng(1)
    for number, (height, width) in enumerate([(20, 20), (16, 32), (30, 14)] * 3):
        picture = Image.fromarray(pixels.integers(0, 255, (height, width, 3), dtype=np.uint8))
        picture.save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}, red, green, blue", encoding="utf-8")
    return folder


CAPTIONED = (
    "--buckets --caption_dropout 0.3 --shuffle_tags --keep_tags 1 --holdout 1 --train_batch_size 4 --optimizer sgd"
)


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_captioned_images_of_all_shapes(
    train_captioned: Train, captioned: Path, request: pytest.FixtureRequest, family: str
) -> None:
    model = request.getfixturevalue(f"{family}_folder")
    side = {"sd": 16, "flux": 32}[family]
    more = f"--pretrained_model_name_or_path {model} --train_data_dir {captioned} --resolution {side}"
    run = train_captioned(*CAPTIONED.split(), *more.split(), "--learning_rate", "0.1")
    losses = [value for step, name, value in values(run) if name == "eval/loss"]
    assert losses[-1] < losses[0]
    summary = json.loads(run.summary_file.read_text(encoding="utf-8"))
    assert summary["data"] == {"instance": 8} and summary["parity"]["max_abs"] <= 1
    prompts = {row["prompt"] for row in run.sample_rows()}
    assert len(prompts) == 1 and prompts.pop().endswith("red, green, blue")  # of the held-out image


def test_resumed_with_buckets_equals_uninterrupted(train_captioned: Train, captioned: Path, tmp_path: Path) -> None:
    flags = [*CAPTIONED.split(), "--train_data_dir", str(captioned), "--lora_dropout", "0.2", "--sample_steps", "0"]
    whole = train_captioned(*flags, "--output_dir", str(tmp_path / "whole"))
    train_captioned(*flags, "--max_train_steps", "4")
    resumed = train_captioned(*flags, "--resume_from_checkpoint", "latest")
    assert same(weights(whole), weights(resumed)) and values(whole)[-9:] == values(resumed)[-9:]


def test_accumulation_with_buckets_changes_nothing(train_captioned: Train, captioned: Path, tmp_path: Path) -> None:
    flags = [*CAPTIONED.split(), "--train_data_dir", str(captioned), "--sample_steps", "0", "--learning_rate", "0.1"]
    whole = weights(train_captioned(*flags, "--output_dir", str(tmp_path / "whole")))
    parts = weights(train_captioned(*flags, "--train_batch_size", "2", "--gradient_accumulation_steps", "2"))
    assert all(torch.allclose(whole[name], parts[name], atol=1e-6) for name in whole)


def test_a_bucket_step_must_fit_the_family(train_captioned: Train, captioned: Path, flux_folder: Path) -> None:
    more = f"--pretrained_model_name_or_path {flux_folder} --train_data_dir {captioned} --resolution 32 --bucket_step 8"
    with pytest.raises(UserError, match=r"--bucket_step must be a multiple of 16 \(got 8\)"):
        train_captioned("--buckets", *more.split())


@pytest.mark.parametrize("more", ["", "--ema_decay 0.5"])
def test_the_evaluation_costs_what_was_said_before(
    train: Callable[..., RunFolder], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, more: str
) -> None:
    passes: list[int] = []
    original = loop.Run.predict

    def counting(run: loop.Run, noisy: torch.Tensor, *rest: Any) -> torch.Tensor:
        passes.append(len(noisy))
        return original(run, noisy, *rest)

    monkeypatch.setattr(loop.Run, "predict", counting)
    caplog.set_level("INFO", logger="dreamlora")
    run = train(
        "--sample_steps", "0", "--learning_rate", "0.5", *more.split()
    )  # too high: the best step is not the last
    price = json.loads(run.summary_file.read_text(encoding="utf-8"))["eval_price"]
    assert run.selection()["step"] != 6
    assert price["forwards"] == sum(passes)
    assert price["sentence"] in caplog.text and price["sentence"] in run.report_md.read_text(encoding="utf-8")
    assert price["share"] == round(sum(passes) / (6 * 4 * 2), 4) and price["seconds"] > 0


def test_what_can_hardly_be_meant_is_told_and_stands_in_the_report(
    train: Train, caplog: pytest.LogCaptureFixture
) -> None:
    flags = "--max_train_steps 1 --optimizer prodigy --learning_rate 1e-4 --lr_power 2 --lora_alpha 1 --rank 64"
    run = train(*flags.split(), "--eval_steps", "0", "--sample_steps", "0", "--no_parity_check")
    report = run.report_md.read_text(encoding="utf-8")
    for told in (
        "--learning_rate 0.0001 is far from what --optimizer prodigy needs",
        "--lr_power has no effect",
        "--lora_alpha 1 with --rank 64 scales the LoRA by 0.015625",
        "--rank 64 is more than",
    ):
        assert told in caplog.text and told in report.replace("\\", ""), told


def test_options_of_other_models_are_refused_before_anything_is_encoded(
    train: Train, flux_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dreamlora.run import opening

    monkeypatch.setattr(opening, "read_images", lambda *_: pytest.fail("images were read"))
    with pytest.raises(UserError, match="--snr_gamma is for diffusion models"):
        train("--pretrained_model_name_or_path", str(flux_folder), "--snr_gamma", "5")
