"""Time of `dreamlora evaluate` for images that exist: CLIP score, KID, FID and DINO in the eyes of the embedded CLIP.

    python benchmarks/evaluate_speed.py --images 1000

Pictures of the embedded model's world are drawn as PNG files with captions (not timed), as many again as references.
Then the command is timed as a user would see it, from the interpreter's start to the table: first with an empty cache,
then once more with the embeddings cached.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _cli
import _machine
from PIL import Image

from dreamlora.errors import UserError
from dreamlora.tiny import world

TARGET_S = 60.0
METRICS = ("clip_score", "kid", "fid", "dino")


def draw_pictures(folder: Path, count: int, side: int, seed: int) -> None:
    """``count`` PNG files of ``side`` pixels and metadata.jsonl with their captions."""
    folder.mkdir(parents=True)
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        scene = world.sample_scene(rng)
        name = f"{number:05d}.png"
        world.render(scene, rng).resize((side, side), Image.Resampling.BICUBIC).save(folder / name)
        rows.append({"file_name": name, "text": world.describe(scene)})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def timed(command: list[str], threads: int) -> float:
    """Seconds of a command by the clock.

    Raises:
        UserError: it failed; the message is what it wrote.
    """
    started = time.perf_counter()
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment)
    if done.returncode:
        raise UserError(done.stderr[-2000:])
    return time.perf_counter() - started


def summary(first: float, cached: float, metrics: dict[str, Any]) -> dict[str, Any]:
    """The figures, and whether the target is met."""
    values = {value["name"]: value["value"] for value in metrics["rows"][0]["values"]}
    return {
        "seconds": round(first, 2),
        "seconds_cached": round(cached, 2),
        "target_seconds": TARGET_S,
        "target_met": first <= TARGET_S,
        "values": values,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--side", type=int, default=64, help="of the pictures, in pixels")
    parser.add_argument("--threads", type=int, default=_machine.usable_cores())
    parser.add_argument("--results", type=Path, default=_machine.RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        draw_pictures(place / "generated", options.images, options.side, seed=1)
        draw_pictures(place / "references", options.images, options.side, seed=2)
        command = [sys.executable, "-m", "dreamlora", "evaluate", str(place / "generated"), "--metrics", *METRICS]
        command += ["--references", str(place / "references"), "--clip_model", "tiny", "--dino_model", "tiny"]
        command += ["--output_dir", str(place / "out"), "--latents_cache_dir", str(place / "cache")]
        first, cached = (timed(command, options.threads) for _ in range(2))
        found = summary(first, cached, json.loads((place / "out" / "metrics.json").read_text(encoding="utf-8")))
    result = {
        "command": _machine.command("evaluate_speed.py"),
        "images": options.images,
        "references": options.images,
        "side": options.side,
        "metrics": METRICS,
        **found,
        **_machine.describe(options.threads),
    }
    print(json.dumps(found, indent=1))
    print(f"wrote {_machine.write('evaluate_speed', result, options.results)}")


if __name__ == "__main__":
    _cli.start(main)
