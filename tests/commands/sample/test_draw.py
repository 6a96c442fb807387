"""``dreamlora sample`` on a small pipeline with real LoRA files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image

from dreamlora.commands.rows import rows_of
from dreamlora.commands.sample.command import main
from dreamlora.commands.sample.flags import SampleConfig
from dreamlora.errors import UserError
from dreamlora.jsonl import read_jsonl
from dreamlora.runfolder import RunFolder
from dreamlora.schemas import OBJECT


def save_lora(sd_folder: Path, folder: Path, strength: float) -> Path:
    """A LoRA with all of lora_B at ``strength``."""
    pipeline = StableDiffusionPipeline.from_pretrained(sd_folder)
    torch.manual_seed(1)
    pipeline.unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v"]))
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(strength)
    state = get_peft_model_state_dict(pipeline.unet)
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=state)
    return folder / "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def run(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run folder with two checkpoints, the second one final."""
    folder = RunFolder(tmp_path_factory.mktemp("outputs") / "dog-adamw")
    folder.path.mkdir()
    folder.config_file.write_text(
        f"pretrained_model_name_or_path: {sd_folder}\ninstance_prompt: a photo of sks dog\nclass_prompt: a dog\n",
        encoding="utf-8",
    )
    save_lora(sd_folder, folder.checkpoint_dir(1), 1.0)
    save_lora(sd_folder, folder.checkpoint_dir(2), 5.0)
    save_lora(sd_folder, folder.path, 5.0)
    return folder


def sample(output: Path, *argv: Any) -> list[dict[str, Any]]:
    flags = ["--output_dir", output, "--num_inference_steps", 2, "--resolution", 16]
    main([str(word) for word in [*argv, *flags, "--trust_runs"]])
    return list(read_jsonl(output / "samples.jsonl", OBJECT))


def test_rows_are_base_checkpoints_and_scales(
    tmp_path: Path, run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = sample(tmp_path / "out", run.path, "--checkpoints", "--lora_scales", 0.5, 1, "--prompts", "a {}", "a cat")
    assert capsys.readouterr().out.strip() == str(tmp_path / "out" / "grid.png")
    assert [row["lora_scale"] for row in rows[::2]] == [0.0, 0.5, 1.0, 0.5, 1.0], "the final LoRA is checkpoint 2"
    assert [row["prompt"] for row in rows[:2]] == ["a sks dog", "a cat"]
    assert [row["seed"] for row in rows[:4]] == [42, 43, 42, 43]
    hashes = [row["sha256"] for row in rows[::2]]
    assert len(set(hashes)) == 5, "every row is another image"
    with Image.open(tmp_path / "out" / "grid.png") as picture:
        assert picture.height > 5 * 256


def test_scale_zero_is_the_base_model(tmp_path: Path, run: RunFolder) -> None:
    rows = sample(tmp_path / "out", run.path, "--lora_scales", 0)
    assert [row["prompt"] for row in rows] == ["a photo of sks dog", "a dog"] * 2, "the run's prompts"
    assert [row["sha256"] for row in rows[:2]] == [row["sha256"] for row in rows[2:]]


def test_what_is_not_given_is_as_the_run_drew_it(tmp_path: Path, run: RunFolder) -> None:
    before = run.config_file.read_text(encoding="utf-8")
    run.config_file.write_text(before + "sample_guidance_scale: 2.5\nresolution: 16\n", encoding="utf-8")
    rows = sample(tmp_path / "out", run.path, "--prompts", "a cat")
    given = sample(tmp_path / "given", run.path, "--prompts", "a cat", "--sample_guidance_scale", 4)
    run.config_file.write_text(before, encoding="utf-8")
    assert [rows[0]["guidance_scale"], given[0]["guidance_scale"]] == [2.5, 4.0]


def test_a_file_needs_model_and_prompts(tmp_path: Path, run: RunFolder, sd_folder: Path) -> None:
    file = tmp_path / "dog.safetensors"
    file.write_bytes(run.lora_file.read_bytes())
    with pytest.raises(UserError, match="--prompts"):
        sample(tmp_path / "out", file, "--pretrained_model_name_or_path", sd_folder)
    with pytest.raises(UserError, match=r"--prompts: .*--subject"):
        sample(tmp_path / "out", file, "--pretrained_model_name_or_path", sd_folder, "--prompts", "a {}")
    rows = sample(tmp_path / "out", file, "--pretrained_model_name_or_path", sd_folder, "--prompts", "a cat")
    assert [row["lora"] for row in rows] == [None, str(file)]


def test_a_negative_prompt_that_does_nothing_is_told(tmp_path: Path, run: RunFolder, caplog) -> None:
    for guidance, told in ((1, True), (3, False)):
        caplog.clear()
        sample(tmp_path / "out", run.path, "--negative_prompt", "ugly", "--sample_guidance_scale", guidance)
        assert ("the negative prompt has no effect" in caplog.text) is told


def test_mistakes_are_found_before_the_model_loads(tmp_path: Path, run: RunFolder) -> None:
    with pytest.raises(UserError, match="no such LoRA"):
        sample(tmp_path, run.path / "nothing.safetensors")
    with pytest.raises(UserError, match="not both"):
        sample(tmp_path, run.path, "--prompts", "a", "--sample_prompts", "b.txt")
    with pytest.raises(UserError, match="--num_images_per_prompt must be at least 1"):
        sample(tmp_path, run.path, "--num_images_per_prompt", 0)


def test_the_best_checkpoint_has_a_row_of_its_own(run: RunFolder, sd_folder: Path, tmp_path: Path) -> None:
    def labels(*paths: Path, **options: Any) -> list[str]:
        config = SampleConfig(lora=paths, trust_runs=True, **options)
        return [row.label.replace("\n", ", ") for row in rows_of(config)]

    with pytest.raises(UserError, match="--best: no checkpoint was selected in"):
        labels(run.path, best=True)
    copy = RunFolder(shutil.copytree(run.path, tmp_path / "dog-adamw"))
    save_lora(sd_folder, copy.best, 1.0)
    copy.selection_file.write_text('{"step": 1}', encoding="utf-8")
    assert labels(copy.path, best=True) == ["base model", "dog-adamw, best: step 1", "dog-adamw, final"]
    assert labels(copy.best) == ["base model", "dog-adamw, best: step 1"]
    every = labels(copy.path, best=True, checkpoints=True)
    assert every == ["base model", *(f"dog-adamw, {name}" for name in ("step 1", "step 2", "best: step 1"))]
    assert labels(copy.best / "pytorch_lora_weights.safetensors")[1] == "pytorch_lora_weights"
