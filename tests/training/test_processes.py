"""Two processes on the CPU give what one gives, up to the order of sums."""

from __future__ import annotations

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


def test_two_processes_equal_one(flags: list[str], train: Callable[..., RunFolder], tmp_path: Path) -> None:
    more = ["--optimizer", "sgd", "--learning_rate", "0.1", "--max_train_steps", "3"]
    prior = ["--with_prior_preservation", "--class_prompt", "dog", "--num_class_images", "3"]
    one = train(*more, *prior, "--output_dir", str(tmp_path / "one"))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    launch = ["--cpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
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
            *(REPOSITORY / "train_scripts" / "dreambooth_lora.py", *flags, *more, *prior),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = RunFolder(tmp_path / "run")
    first, second = weights(one), weights(two)
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], atol=1e-7), name
    losses = [
        [row["value"] for row in run.metrics() if row["name"] in ("eval/loss", "train/loss")] for run in (one, two)
    ]
    assert torch.allclose(*map(torch.tensor, losses), atol=1e-5)
    assert len(list(two.samples.rglob("*.png"))) == len(list(one.samples.rglob("*.png")))
