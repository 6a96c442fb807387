"""Two processes on the CPU give what one gives, up to the order of sums."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from dreamlora.runfolder import RunFolder
from tests.training.test_run import weights

REPOSITORY = Path(__file__).parents[2]


def train_with_two(flags: list[str]) -> None:
    """Run the training script in two processes."""
    run_with_two("dreambooth_lora.py", flags)


def run_with_two(script: str, flags: list[str]) -> str:
    """Run one of the scripts in two processes; what they wrote."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "accelerate.commands.launch",
                *launch,
                "--dynamo_backend",
                "no",
                "--main_process_port",
                str(port),
            ),
            *(REPOSITORY / "train_scripts" / script, *flags),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-10000:]
    return done.stdout


def test_two_processes_equal_one(flags: list[str], train: Callable[..., RunFolder], tmp_path: Path) -> None:
    more = ["--optimizer", "sgd", "--learning_rate", "0.1", "--max_train_steps", "3"]
    more += ["--eval_metrics", "clip_score", "--clip_model", "tiny"]
    prior = ["--with_prior_preservation", "--class_prompt", "dog", "--num_class_images", "3"]
    one = train(*more, *prior, "--output_dir", str(tmp_path / "one"))
    train_with_two([*flags, *more, *prior])
    two = RunFolder(tmp_path / "run")
    assert json.loads(two.summary_file.read_text())["processes"] == 2  # accelerate may start one without a word
    first, second = weights(one), weights(two)
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], atol=1e-7), name
    scores = [[row["value"] for row in run.metrics() if row["name"] == "img/clip_t"] for run in (one, two)]
    assert len(scores[0]) == 2 and torch.allclose(*map(torch.tensor, scores), atol=1e-3)  # pixels are rounded
    losses = [
        [row["value"] for row in run.metrics() if row["name"] in ("eval/loss", "train/loss", "eval/final_loss")]
        for run in (one, two)
    ]
    assert torch.allclose(*map(torch.tensor, losses), atol=1e-5)
    assert one.selection()["step"] == two.selection()["step"]
    assert len(list(two.samples.rglob("*.png"))) == len(list(one.samples.rglob("*.png")))


def test_two_processes_share_the_probing_of_lora_ga(
    flags: list[str], train: Callable[..., RunFolder], tmp_path: Path
) -> None:
    quick = ["--max_train_steps", "1", "--sample_steps", "0", "--eval_steps", "0"]
    more = ["--init", "lora_ga", "--init_args", "draws", "8", *quick]
    one = train(*more, "--output_dir", str(tmp_path / "one"))
    train_with_two([*flags, *more])
    starts = [
        torch.load(run.checkpoint_dir(1) / "training_state.pt", weights_only=True)["starts"]
        for run in (one, RunFolder(tmp_path / "run"))
    ]
    assert starts[0].keys() == starts[1].keys() and starts[0]
    for name, start in starts[0].items():
        for factor, tensor in start.items():
            assert torch.allclose(tensor, starts[1][name][factor], atol=1e-3 * float(tensor.abs().max())), name
