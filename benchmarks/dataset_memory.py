"""Does memory grow with the number of images? Peak memory and start-up time of a captioned data set, by its rows.

    python benchmarks/dataset_memory.py

For every one of --rows, a folder of small images of several shapes with metadata.jsonl is written. Then a process of
its own goes the way of a run (captions, hashes, hold-out, cache of images and prompts, buckets, --steps training
batches), and another one starts again on the same folder. Autoencoder and text encoder are stand-ins that compute next
to nothing: their memory does not depend on the rows. Peak memory is what the system reports for the finished process.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _cli
import _machine
import torch
from PIL import Image
from torch import Tensor

from dreamlora.config import Data
from dreamlora.data.buckets import bucket_sizes
from dreamlora.data.cache import TensorCache
from dreamlora.data.captions import CaptionPlan
from dreamlora.data.dataset import load_images, split_holdout
from dreamlora.data.encode import Filling, encode_dataset, encode_prompts
from dreamlora.data.transforms import Preparation, Preparations, bucket_numbers
from dreamlora.interfaces import Latents
from dreamlora.objectives import Diffusion
from dreamlora.training.stream import Layout, Source, Stream, stack_conditioning

SHAPES = ((16, 16), (24, 16), (16, 24), (32, 16))
SIDE = 16
WORDS = ("red", "green", "blue", "small", "large", "old", "new", "wooden", "quiet", "bright", "dark", "round", "tall")


def main() -> None:
    """Measure every size and write the result."""
    options = _options()
    if options.measure:
        print(json.dumps(measure(options.measure, options.steps)))
        return
    torch.set_num_threads(1)
    runs = [run(rows, options.steps) for rows in options.rows]
    least = min(runs, key=lambda entry: entry["rows"])
    result = {
        "command": _machine.command(Path(__file__).name),
        "machine": _machine.describe(1),
        "steps": options.steps,
        "runs": runs,
        "growth_mib": {str(entry["rows"]): round(entry["peak_mib"] - least["peak_mib"], 1) for entry in runs},
    }
    print(_machine.write("dataset_memory", result, options.results))


def run(rows: int, steps: int) -> dict[str, Any]:
    """Write the folder, and measure two starts on it."""
    with tempfile.TemporaryDirectory() as place:
        write_folder(Path(place) / "images", rows)
        first = _child(Path(place), steps)
        again = _child(Path(place), steps)
    print(f"{rows} rows: {first['peak_mib']} MiB, {first['seconds']} s; again {again['seconds']} s", file=sys.stderr)
    return {"rows": rows, **first, "start_again": again}


def write_folder(folder: Path, rows: int) -> None:
    """Images that all differ, with captions of tags that all differ."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    with (folder / "metadata.jsonl").open("w", encoding="utf-8") as metadata:
        for row in range(rows):
            name, (width, height) = f"{row:07d}.bmp", SHAPES[row % len(SHAPES)]
            Image.frombytes("RGB", (width, height), draw.randbytes(3 * width * height)).save(folder / name)
            text = ", ".join([f"picture number {row}", *draw.sample(WORDS, 6)])
            metadata.write(json.dumps({"file_name": name, "text": text}) + "\n")


def measure(place: Path, steps: int) -> dict[str, Any]:
    """One process's way from the folder to its last training batch; memory and seconds by stage."""
    torch.set_num_threads(1)
    baseline = _peak_mib()
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def done(stage: str) -> None:
        nonlocal started
        seconds[stage] = round(time.perf_counter() - started, 2)
        started = time.perf_counter()

    data = Data(train_data_dir=place / "images", latents_cache_dir=place / "cache", buckets=True, bucket_step=8)
    train, _ = split_holdout(load_images(data).records, None)
    done("captions and hashes")
    filling = Filling(TensorCache(place / "cache"), {"model": "stand-in"}, progress=False)
    plan = CaptionPlan(dropout=0.1)
    prompts = encode_prompts((text for record in train for text in plan.texts(record.captions)), _text, filling)
    encode_prompts([""], _text, filling)
    done("prompts")
    how = Preparations((Preparation(SIDE, center_crop=True, sizes=bucket_sizes(SIDE, 8)),))
    store = encode_dataset(train, how, _images, filling)
    done("images")
    source = Source("instance", store, 1.0, plan.draw, bucket_numbers(train, how))
    stream = Stream(
        [source],
        Diffusion(torch.linspace(0.99, 0.01, 1000), "epsilon", None),
        lambda captions, views: stack_conditioning([prompts[caption] for caption in captions], {}),
        Layout(4, 1, 0, 1),
        seed=0,
    )
    for step in range(steps):
        stream.batches(step, 0)
    done(f"{steps} training batches")
    return {"baseline_mib": baseline, "peak_mib": _peak_mib(), "seconds": seconds}


def _images(pixels: Tensor) -> Latents:
    mean = torch.nn.functional.avg_pool2d(pixels, 8)
    return Latents(mean, mean.abs())


def _text(prompts: list[str]) -> dict[str, Tensor]:
    return {"prompt_embeds": torch.full((len(prompts), 8, 16), float(len(prompts[0])))}


def _child(place: Path, steps: int) -> dict[str, Any]:
    words = [sys.executable, __file__, "--measure", str(place), "--steps", str(steps)]
    return dict(json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE, encoding="utf-8").stdout))


def _peak_mib() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--steps", type=int, default=1000, help="training batches of 4")
    parser.add_argument("--results", type=Path, default=_machine.RESULTS, help="folder of the result")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    _cli.start(main)
