"""A run folder as training leaves it, made up."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image, ImageDraw

from dreamlora.config import RunConfig, as_flat_dict
from dreamlora.eval_loss.items import ItemLosses
from dreamlora.runfolder import RunFolder

PROMPTS = ["a photo of sks creature", "a photo of sks creature on grass", "a <script>alert(1)</script> | creature"]
SUMMARY: dict[str, Any] = {
    "parity": {"prompt": PROMPTS[0], "seed": 42, "step": 300, "max_abs": 1.0, "mean_abs": 0.002, "psnr_db": 72.4},
    "timings": {"text encoder": 1.2, "images": 3.4, "class images": 21.0, "training": 64.5, "samples": 19.8},
    "peak_memory": {"images": {"allocated": 1.5, "reserved": 2.0}, "training": {"allocated": 8.25, "reserved": 9.0}},
    "versions": {"python": "3.11.2", "torch": "2.13.0", "diffusers": "0.40.0", "peft": "0.20.0"},
    "device": "x86_64 CPU, 2 threads",
    "git_commit": "0123456789ab",
    "warnings": [],
    "data": {"instance": 20, "class": 64},
    "lora": {"parameters": 1234567, "pairs": 96},
    "eval": {"base": 0.5, "final": 0.4, "best": 0.39, "best_step": 250},
    "command": "accelerate launch train_scripts/dreambooth_lora.py --optimizer scaled_adamw "
    "--instance_prompt 'a photo of sks creature' --hub_token hf_secret",
}


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunFolder]:
    def make(name: str = "eval/loss", steps: int = 300, summary: dict[str, Any] | None = SUMMARY) -> RunFolder:
        return write_run(tmp_path / "creature-scaled_adamw", name, steps, summary)

    return make


@pytest.fixture
def make_comparison(tmp_path: Path) -> Callable[..., Path]:
    def make(**changes: Any) -> Path:
        return write_comparison(tmp_path / "adamw-vs-scaled_adamw", **changes)

    return make


def write_run(
    path: Path, name: str = "eval/loss", steps: int = 300, summary: dict[str, Any] | None = SUMMARY
) -> RunFolder:
    folder = RunFolder(path)
    folder.path.mkdir(exist_ok=True)
    base = RunConfig()
    config = replace(
        base,
        lora=replace(base.lora, rank=8, lora_layers=("all",)),
        optim=replace(base.optim, optimizer="scaled_adamw", learning_rate=1e-2),
        train=replace(base.train, max_train_steps=300, hub_token="hf_secret"),
    )
    folder.config_file.write_text(yaml.safe_dump(as_flat_dict(config), sort_keys=False), encoding="utf-8")
    write_metrics(folder, name, steps)
    draw_pictures(folder)
    if summary is not None:
        folder.summary_file.write_text(json.dumps(summary), encoding="utf-8")
    return folder


def write_metrics(folder: RunFolder, name: str, steps: int) -> None:
    rng = random.Random(0)
    rows: list[tuple[int, str, float]] = []
    for step in range(steps + 1):
        if step:
            rows.append((step, "train/loss", 0.3 + 0.2 * math.exp(-step / 80) + rng.gauss(0, 0.12) ** 2 * 6))
            rows.append((step, "train/learning_rate", 1e-2))
            rows.append((step, "train/grad_norm", 0.4 + abs(rng.gauss(0, 0.2))))
            rows.append((step, "train/steps_per_s", 4.6 + rng.gauss(0, 0.1)))
        if step % 25 == 0:
            size = 2 * math.sqrt(step / 300)
            for group, share in (("", 1.0), ("/down_blocks", 0.5), ("/mid_block", 0.3), ("/up_blocks", 0.81)):
                rows.append((step, f"lora/dw_norm{group}", size * share))
                if step:
                    rows.append((step, f"lora/stable_rank{group}", 1.5 + size))
                    rows.append((step, f"opt/update_rms{group}", 1e-4 * share))
                rows.append((step, f"lora/balance{group}", 0.1 * size))
            rows.append((step, name, 0.39 + 0.11 * math.exp(-step / 60) + max(0, step - 200) * 5e-5))
    lines = [json.dumps({"v": 1, "step": step, "name": name, "value": value}) + "\n" for step, name, value in rows]
    folder.metrics_file.write_text("".join(lines), encoding="utf-8")
    items = np.linspace(0.6, 0.3, 40)
    losses = ItemLosses("ab", np.repeat(range(5), 8), np.linspace(0.05, 0.95, 40), {0: items, 300: items - 0.1})
    losses.save(folder.eval_items_file)


def draw_pictures(folder: RunFolder) -> None:
    rows, side = 7, 64
    grid = Image.new("RGB", (3 * side, rows * side), "#888")
    pen = ImageDraw.Draw(grid)
    for row in range(rows):
        for column in range(3):
            left, top = column * side, row * side
            pen.rectangle((left, top, left + 62, top + 62), fill=("#7fb069", "#cfe3f5", "#30365a")[column])
            pen.ellipse((left + 16, top + 16, left + 46, top + 46), fill=(250, 200 - 20 * row, 60 + 20 * row))
    grid.save(folder.grid_file)
    frames = [grid.crop((0, side * row, grid.width, side * row + side)) for row in range(rows)]
    frames[0].save(folder.timelapse_file, save_all=True, append_images=frames[1:], duration=200)
    folder.reference_dir.mkdir(exist_ok=True)
    for number, frame in enumerate(frames[:5]):
        frame.crop((0, 0, side, side)).save(folder.reference_dir / f"{number}.png")
    folder.samples.mkdir(exist_ok=True)
    rows_of_samples = [
        {"step": step, "prompt_index": k, "image_index": 0, "prompt": prompt, "seed": 42, "file": f"{step}-{k}.png"}
        for step in (0, 300)
        for k, prompt in enumerate(PROMPTS)
    ]
    folder.samples_file.write_text("".join(json.dumps(row) + "\n" for row in rows_of_samples), encoding="utf-8")


def write_comparison(folder: Path, **changes: Any) -> Path:
    """The example of a compare.json with other values for some of its fields, and with its samples."""
    content = {**compare_example(), **changes}
    draw_cells(folder, content)
    (folder / "compare.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def compare_example() -> dict[str, Any]:
    example: dict[str, Any] = json.loads((Path(__file__).parent / "compare_example.json").read_text(encoding="utf-8"))
    return example


def draw_cells(folder: Path, content: dict[str, Any]) -> None:
    """The samples that a compare.json names: circles that grow with the steps, in a colour for every method."""
    folder.mkdir(exist_ok=True)
    for method, colour in zip(content["methods"], ("#d0d0d0", "#ffd23f", "#ee4266", "#3bceac"), strict=False):
        samples = method["samples"] or {"cells": [], "references": []}
        files = [(cell["file"], cell["step"], cell["prompt_index"]) for cell in samples["cells"] if cell["file"]]
        for name, step, prompt in (*files, *((name, 0, 0) for name in samples["references"])):
            image = Image.new("RGB", (64, 64), ("#7fb069", "#30365a")[prompt % 2])
            size = 6 + step // 8
            ImageDraw.Draw(image).ellipse((32 - size, 32 - size, 32 + size, 32 + size), fill=colour)
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            image.save(folder / name)
