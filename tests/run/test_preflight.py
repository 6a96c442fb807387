"""What is wrong without torch is told without it: in a process of its own, where importing torch would be an error."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dreamlora.config import Data, RunConfig
from dreamlora.run import preflight
from tests.data.odd_folder import picture

ROOT = Path(__file__).parents[2]
NO_TORCH = """
import sys
class Refused:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("torch", "diffusers", "transformers", "accelerate", "peft"):
            sys.exit(f"{name} is imported")
sys.meta_path.insert(0, Refused())
from dreamlora.__main__ import main
sys.exit(main())
"""


def told(folder: Path, *argv: str) -> str:
    """What a command says that ends with a message."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, *argv], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: "), done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    picture(place / "photos" / "a.png")
    picture(place / "bare" / "a.png")
    picture(place / "above" / "photos" / "a.png")
    for name in ("empty", "model", "runs/there"):
        (place / name).mkdir(parents=True)
    for name, text in (("file", "x"), ("prompts.txt", "# none\n"), ("brace.txt", "{} x"), ("photos/a.txt", "red")):
        (place / name).write_text(text, encoding="utf-8")
    (place / "latin.txt").write_bytes(b"caf\xe9")
    (place / "runs/there/config.yaml").write_text("seed: 1\n", encoding="utf-8")
    return place


PHOTOS = "--instance_data_dir photos"
CASES = {
    "a file as photos": ("--instance_data_dir file", r"instance_data_dir file is a file: give the folder it lies in"),
    "no photos": ("--instance_data_dir empty", "empty holds no images"),
    "photos below": ("--instance_data_dir above", "above holds images only in sub-folders"),
    "no captions": (
        "--instance_data_dir bare --pretrained_model_name_or_path some/model",
        r"a\.png has no caption, or an empty one",
    ),
    "caption column": (f"{PHOTOS} --caption_column x", "--caption_column x: photos has no metadata"),
    "a file as class images": (
        f"{PHOTOS} --with_prior_preservation --class_prompt x --class_data_dir file",
        "--class_data_dir file is a file",
    ),
    "no such data set": ("--dataset_name ./gone", r"--dataset_name \./gone: there is no such folder"),
    "a file as data set": ("--dataset_name file", "--dataset_name file is a file"),
    "a folder of prompts": (f"{PHOTOS} --sample_prompts empty", "cannot read the prompts in empty"),
    "no prompts": (f"{PHOTOS} --sample_prompts prompts.txt", "prompts.txt holds no prompts"),
    "prompts in latin-1": (f"{PHOTOS} --eval_prompts latin.txt", "cannot read the prompts in latin.txt"),
    "prompts without a subject": (
        f"{PHOTOS} --sample_prompts brace.txt --pretrained_model_name_or_path some/model",
        r"brace\.txt, line 1: nothing to put in place",
    ),
    "no such model": (f"{PHOTOS} --pretrained_model_name_or_path ./gone", r"no such folder: \./gone"),
    "no model": (f"{PHOTOS} --pretrained_model_name_or_path model", r"model: no model_index\.json"),
    "a file as model": (
        f"{PHOTOS} --pretrained_model_name_or_path file",
        "cannot read file: it is damaged or not a safetensors file",
    ),
    "no autoencoder": (f"{PHOTOS} --pretrained_vae_model_name_or_path model", r"model: no config\.json"),
    "a file as output": (f"{PHOTOS} --output_dir file", "--output_dir file is a file"),
    "a run as output": (f"{PHOTOS} --output_dir runs/there", "--output_dir runs/there holds a run already"),
    "no such checkpoint": (
        f"{PHOTOS} --output_dir runs/there --resume_from_checkpoint step-9",
        "--resume_from_checkpoint step-9: no checkpoint there",
    ),
    "a file as cache": (f"{PHOTOS} --latents_cache_dir file", "--latents_cache_dir file is a file"),
    "a file for downloads": (f"{PHOTOS} --cache_dir file", "--cache_dir file is a file"),
    "a folder of weights": (f"{PHOTOS} --inception_weights empty", "--inception_weights empty is a folder"),
    "nothing to train on": ("--pretrained_model_name_or_path some/model", "nothing to train on: give --instance"),
    "rank": (f"{PHOTOS} --init orthogonal --rank 3", "--init orthogonal needs a --rank that is a multiple of 2"),
}


@pytest.mark.parametrize("name", CASES)
def test_wrong_values_do_not_wait_for_torch(place: Path, name: str) -> None:
    flags, message = CASES[name]
    assert re.search(message, told(place, "dreambooth", *flags.split()))


@pytest.mark.parametrize(
    "argv",
    ["text-to-image --train_data_dir empty", "compare --optimizers adamw sgd --quick --instance_data_dir empty"],
)
def test_other_programs(place: Path, argv: str) -> None:
    assert "empty holds no images" in told(place, *argv.split())


def test_right_values_pass(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    preflight.check(RunConfig(data=Data(subject="robot")))
    assert list(tmp_path.iterdir()) == []
