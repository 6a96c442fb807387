"""Two processes on the CPU give what one gives, up to the order of sums."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dreamlora.families import sd
from dreamlora.runfolder import RunFolder
from tests.training.conftest import train_with
from tests.training.forked import in_two_processes

pytestmark = pytest.mark.usefixtures("no_report")

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "train_scripts" / "dreambooth_lora.py"
ON_CPU = {
    **{"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"},
    "PYTHONPATH": str(REPOSITORY),
}
"""Environment of a training in processes of its own."""
TIMEOUT_S = 150
"""Several times what a run takes: processes that wait for each other do it for ever."""

QUICK = "--optimizer sgd --learning_rate 0.1 --sample_steps 0 --eval_steps 0 --holdout 0 --checkpointing_steps 0"
"""Steps alone."""


def train_with_two(flags: list[str], script: Path = SCRIPT) -> str:
    """Run a script, that of the training by default, in two processes; what they printed, then what they said."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = f"-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port {port}"
    words = [*launch.split(), "--mixed_precision", "no", "--dynamo_backend", "no", str(script), *flags]
    launcher = subprocess.Popen(
        [sys.executable, *words],
        env=os.environ | ON_CPU,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        printed, errors = launcher.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        launcher.terminate()  # not kill: it would leave its processes behind
        _, errors = launcher.communicate()
        pytest.fail(f"two processes wait for each other for ever:\n{errors[-3000:]}")
    assert launcher.returncode == 0, errors[-3000:]
    return printed + errors


def train_forked(flags: list[str]) -> None:
    """The same without the launcher, and without the seconds that new interpreters take."""
    assert in_two_processes(lambda: train_with(flags)) == [0, 0]


def assert_same_weights(one: RunFolder, two: RunFolder, place: str = "") -> None:
    """Up to the order of sums, in a folder of the runs; and that the second run really had two processes: accelerate
    may start one silently.
    """
    assert json.loads(two.summary_file.read_text(encoding="utf-8"))["processes"] == 2
    first, second = (load_file(run.path / place / run.lora_file.name) for run in (one, two))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], atol=1e-7), name


def test_two_processes_equal_one(flags: list[str], train: Callable[..., RunFolder], tmp_path: Path) -> None:
    more = ["--optimizer", "sgd", "--learning_rate", "0.1", "--max_train_steps", "3"]
    more += ["--eval_metrics", "clip_score", "--clip_model", "tiny", "--ema_decay", "0.5"]
    prior = ["--with_prior_preservation", "--class_prompt", "dog", "--num_class_images", "3"]
    one = train(*more, *prior, "--output_dir", str(tmp_path / "one"))
    train_with_two([*flags, *more, *prior])
    two = RunFolder(tmp_path / "run")
    assert_same_weights(one, two)
    assert_same_weights(one, two, "raw")
    scores = [[row["value"] for row in run.metrics() if row["name"] == "img/clip_t"] for run in (one, two)]
    assert len(scores[0]) == 2 and torch.allclose(*map(torch.tensor, scores), atol=1e-3)  # pixels are rounded
    losses = [
        [
            row["value"]
            for row in run.metrics()
            if row["name"] in ("eval/loss", "eval/loss_raw", "train/loss", "eval/final_loss")
        ]
        for run in (one, two)
    ]
    assert torch.allclose(*map(torch.tensor, losses), atol=1e-5)
    assert one.selection()["step"] == two.selection()["step"]
    assert len(list(two.samples.rglob("*.png"))) == len(list(one.samples.rglob("*.png")))


def test_no_collective_waits_for_what_one_process_does_alone(flags: list[str], tmp_path: Path) -> None:
    """NCCL ends a collective after 10 minutes, here all end after seconds; the others must not wait in one."""
    quick = ["--max_train_steps", "2", "--sample_steps", "2", "--eval_steps", "1", "--final_eval_items", "0"]
    printed = train_with_two([*flags, *quick], Path(__file__).with_name("impatient.py"))
    for place in ("lock", "get", "grid_of_run", "on_step", "check"):
        assert f"took long in {place}" in printed
    assert json.loads(RunFolder(tmp_path / "run").summary_file.read_text(encoding="utf-8"))["parity"]["psnr_db"] > 40


def test_two_processes_share_the_probing_of_lora_ga(
    flags: list[str], train: Callable[..., RunFolder], tmp_path: Path
) -> None:
    quick = ["--max_train_steps", "1", "--sample_steps", "0", "--eval_steps", "0"]
    more = ["--init", "lora_ga", "--init_args", "draws", "8", *quick]
    one = train(*more, "--output_dir", str(tmp_path / "one"))
    train_forked([*flags, *more])
    starts = [
        torch.load(run.checkpoint_dir(1) / "training_state.pt", weights_only=True)["starts"]
        for run in (one, RunFolder(tmp_path / "run"))
    ]
    assert starts[0].keys() == starts[1].keys() and starts[0]
    for name, start in starts[0].items():
        for factor, tensor in start.items():
            assert torch.allclose(tensor, starts[1][name][factor], atol=1e-3 * float(tensor.abs().max())), name


@pytest.mark.parametrize("adapter", ["dora", "lokr"])
def test_two_processes_train_other_kinds_of_adapters_alike(
    adapter: str, flags: list[str], train: Callable[..., RunFolder], tmp_path: Path
) -> None:
    more = ["--adapter", adapter, "--max_train_steps", "2", *QUICK.split()]
    one = train(*more, "--output_dir", str(tmp_path / "one"))
    train_forked([*flags, *more])
    assert_same_weights(one, RunFolder(tmp_path / "run"))


@pytest.fixture
def two_sizes(tmp_path: Path) -> Path:
    """Five wide pictures and three high ones: of the steps of four, one mixes the sizes in one process alone."""
    folder = tmp_path / "two sizes"
    folder.mkdir()
    draw = np.random.default_rng(1)
    for number in range(8):
        height, width = (16, 32) if number < 5 else (32, 16)
        pixels = draw.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("more", [[], ["--train_text_encoder"]], ids=["denoiser", "text encoder"])
def test_processes_may_make_different_numbers_of_forward_passes(
    more: list[str], two_sizes: Path, flags: list[str], train: Callable[..., RunFolder], tmp_path: Path
) -> None:
    sizes = ["--buckets", "--resolution", "24", "--bucket_step", "8", "--instance_data_dir", str(two_sizes)]
    more = [*QUICK.split(), *sizes, "--max_train_steps", "4", *more]
    one = train(*more, "--output_dir", str(tmp_path / "one"), "--train_batch_size", "4")
    train_forked([*flags, *more, "--train_batch_size", "2"])
    assert_same_weights(one, RunFolder(tmp_path / "run"))


def last_layer_ignored(text: dict[str, Any], tokens: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``encode_tokens`` of a family of which no gradient reaches the last layer of the text encoder, such as SDXL."""
    return {"prompt_embeds": text["text_encoder"](tokens["input_ids"], output_hidden_states=True).hidden_states[-2]}


def test_layers_without_gradient_stay_as_they_are(
    flags: list[str], train: Callable[..., RunFolder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sd, "encode_tokens", last_layer_ignored)
    more = [*QUICK.split(), "--train_text_encoder", "--adam_weight_decay", "0.5", "--max_train_steps", "3"]
    one = train(*more, "--output_dir", str(tmp_path / "one"))
    train_forked([*flags, *more, "--checkpointing_steps", "1"])
    two = RunFolder(tmp_path / "run")
    assert_same_weights(one, two)
    first, last = (trained(two.checkpoint_dir(step)) for step in (1, 3))
    idle = {name for name in first if "encoders" in name and "layers.1." in name}
    assert len(idle) == 8 < len(first)
    for name in first:
        assert torch.equal(first[name], last[name]) == (name in idle), name


def trained(checkpoint: Path) -> dict[str, torch.Tensor]:
    """LoRA parameters by name."""
    found: dict[str, torch.Tensor] = torch.load(checkpoint / "training_state.pt", weights_only=True)["trainables"]
    return found


def test_what_a_run_has_to_say_is_said_once(flags: list[str], sd_folder: Path, tmp_path: Path) -> None:
    noisy = tmp_path / "noisy"
    shutil.copytree(sd_folder, noisy)
    for file in ("scheduler/scheduler_config.json", "model_index.json"):
        (noisy / file).write_text((noisy / file).read_text(encoding="utf-8").replace("DDIMScheduler", "DDPMScheduler"))
    more = ["--pretrained_model_name_or_path", str(noisy), "--max_train_steps", "1", "--eval_steps", "0"]
    errors = train_with_two([*flags, *more])
    note = "samples are drawn with DDIMScheduler: DDPMScheduler adds noise at every step"
    assert [line.split("\r")[-1] for line in errors.splitlines() if "samples are drawn" in line] == [note]
