"""Run folders of a made-up comparison: the final loss is a parabola in ln(rate), seeds add noise that methods share.

As a program it writes a whole comparison, with sample images, and the example that the report's tests read:

    python -m tests.compare.synthetic FOLDER
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml
from PIL import Image, ImageDraw

from dreamlora import compare
from dreamlora.config import RunConfig, as_flat_dict
from dreamlora.eval_loss.items import ItemLosses
from dreamlora.jsonl import append_jsonl
from dreamlora.runfolder import RunFolder
from dreamlora.sweep.worker import write_outcome

EXAMPLE = Path(__file__).parents[1] / "report" / "compare_example.json"
STEPS = (0, 25, 50, 75, 100, 125, 150)
BASE = 0.54
PROMPTS = ("a photo of sks creature", "a photo of sks creature on a <b>red</b> floor")


@dataclass(frozen=True)
class Curve:
    """How a method's loss depends on rate and seed.

    Attributes:
        best_lr: where the final loss is lowest.
        best: the final loss there.
        bend: ln(loss) rises by ``bend * ln(lr / best_lr)^2``.
        diverges_at: runs at this rate and higher ones end early, as a loss was not finite.
    """

    best_lr: float = 2e-3
    best: float = 0.46
    bend: float = 0.01
    diverges_at: float = math.inf

    def final(self, lr: float, seed: int, own_noise: float) -> float:
        shared = random.Random(seed).gauss(0, 0.004)
        return self.best * math.exp(self.bend * math.log(lr / self.best_lr) ** 2 + shared + own_noise)


def make_run(
    root: Path,
    method: str,
    lr: float,
    seed: int,
    curve: Curve = Curve(),
    *,
    noise: float = 0.0,
    evalset: str = "e" * 16,
    final_set: str | None = None,
    steps: Sequence[int] = STEPS,
    pictures: bool = False,
    ended: bool = True,
    **options: object,
) -> RunFolder:
    """Write one run folder. ``noise`` is the standard deviation of what a method's seed adds on its own."""
    folder = RunFolder(root / "runs" / method.replace(":", "-") / f"lr{lr:g}" / f"seed{seed}")
    folder.path.mkdir(parents=True, exist_ok=True)
    optimizer, _, args = method.partition("+")[0].partition(":")
    base = RunConfig()
    config = replace(
        base,
        optim=replace(base.optim, optimizer=optimizer, learning_rate=lr, adam_weight_decay=0.01),
        train=replace(base.train, seed=seed, max_train_steps=steps[-1]),
        data=replace(base.data, subject="checkerling", instance_prompt=PROMPTS[0]),
    )
    flat = {**as_flat_dict(config), "optimizer_args": args.replace("=", " ").replace(",", " ").split(), **options}
    folder.config_file.write_text(yaml.safe_dump(flat, sort_keys=False), encoding="utf-8")
    rng = random.Random(f"{method} {lr} {seed}")
    final = curve.final(lr, seed, rng.gauss(0, noise) if noise else 0.0)
    diverged = lr >= curve.diverges_at
    losses = [BASE + (final - BASE) * (1 - math.exp(-5 * step / steps[-1])) / (1 - math.exp(-5)) for step in steps]
    if diverged:
        steps, losses = steps[:2], losses[:2]
    _write_metrics(folder, steps, losses, evalset, pictures)
    _write_items(folder.eval_items_file, steps, losses, evalset)
    if final_set and not diverged:
        _write_items(
            folder.final_items_file, steps[:: len(steps) - 1], losses[:: len(losses) - 1], final_set, images=16
        )
    if pictures and not diverged:
        _draw(folder, steps, optimizer)
    if diverged and ended:
        write_outcome(folder, method, "diverged", "the loss is not finite")
    elif ended:
        command = f"dreamlora dreambooth --optimizer {optimizer} --learning_rate {lr:g} --seed {seed}"
        summary = {"command": command, "device": "x86_64 CPU, 2 threads", "git_commit": "0123456789ab"}
        folder.summary_file.write_text(json.dumps({**summary, "versions": {"torch": "2.13.0"}}), encoding="utf-8")
        write_outcome(folder, method, "finished", "")
    return folder


def spoil(folder: RunFolder, how: float | str) -> None:
    """Make a finished run end worse: with ``how`` as its last loss, or "diverged" or "failed"."""
    if isinstance(how, str):
        outcome = folder.outcome()
        write_outcome(folder, outcome["method"], how, "it was spoilt")
        return
    rows = folder.metrics()
    last = max(row["step"] for row in rows)
    for row in rows:
        if row["step"] == last and row["name"] == "eval/loss":
            row["value"] = how if math.isfinite(how) else None
    folder.metrics_file.write_text("", encoding="utf-8")
    append_jsonl(folder.metrics_file, rows)
    for file in (folder.eval_items_file, folder.final_items_file):
        if file.exists():
            losses = ItemLosses.load(file)
            with np.errstate(invalid="ignore", over="ignore"):
                losses.put(last, (losses.rows[last] * (how / losses.mean(last))).tolist())
            losses.save(file)


def _write_metrics(
    folder: RunFolder, steps: Sequence[int], losses: Sequence[float], evalset: str, pictures: bool
) -> None:
    rows = [
        {"v": 1, "step": step, "name": "eval/loss", "value": loss, "n": 64, "evalset_id": evalset}
        for step, loss in zip(steps, losses, strict=True)
    ]
    rows += [{"v": 1, "step": step, "name": "train/steps_per_s", "value": 8.0} for step in range(1, steps[-1] + 1)]
    if pictures:
        for step, loss in zip(steps, losses, strict=True):
            more = {"v": 1, "step": step, "n": 16, "encoder_id": "tiny-clip"}
            rows.append({**more, "name": "img/clip_t", "value": 0.2 + 0.1 * (BASE - loss)})
            rows.append({**more, "name": "img/dino", "value": 0.3 + 2 * (BASE - loss)})
    folder.metrics_file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _write_items(file: Path, steps: Sequence[int], losses: Sequence[float], evalset: str, *, images: int = 8) -> None:
    count = 8 * images
    position = (np.arange(count) + 0.5) / count
    shape = 0.4 + 1.2 * position
    items = np.array([loss * shape / shape.mean() for loss in losses], dtype=np.float32)
    image = np.tile(np.arange(images), 8)
    np.savez(file, steps=steps, items=items, position=position, image=image, evalset_id=evalset)


def _draw(folder: RunFolder, steps: Sequence[int], optimizer: str) -> None:
    rows = []
    for step in (steps[0], steps[len(steps) // 2], steps[-1]):
        folder.sample_dir(step).mkdir(parents=True)
        for number, prompt in enumerate(PROMPTS):
            image = Image.new("RGB", (64, 64), ("#cfe3f5", "#a33b3b")[number])
            side = 8 + 20 * step // steps[-1]
            box = (32 - side, 32 - side, 32 + side, 32 + side)
            pen = ImageDraw.Draw(image)
            (pen.ellipse if optimizer == "adamw" else pen.rectangle)(box, fill="#f0a030", outline="#222")
            file = folder.sample_dir(step) / f"p{number:02d}_s{42 + number}.png"
            image.save(file)
            told = {"step": step, "prompt_index": number, "image_index": 0, "prompt": prompt, "seed": 42 + number}
            rows.append({**told, "file": file.relative_to(folder.samples).as_posix()})
    folder.samples_file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    folder.reference_dir.mkdir()
    Image.new("RGB", (64, 64), "#f0a030").save(folder.reference_dir / "00.png")


def make_comparison(root: Path) -> compare.ComparisonPlan:
    """Three methods on five rates with three seeds, and five fresh seeds at the best of each."""
    curves = {
        "adamw": Curve(2e-3, 0.46, 0.010, diverges_at=2e-2),
        "scaled_adamw:variant=split": Curve(6.3e-3, 0.445, 0.006),
        "sgd": Curve(20.0, 0.5, 0.012),
    }
    centres = {"adamw": 2e-3, "scaled_adamw:variant=split": 6.32e-3, "sgd": 2.0}
    for method, curve in curves.items():
        rates = [float(f"{centres[method] * 10 ** (k / 2):.3g}") for k in range(-2, 3)]
        for lr in rates:
            for seed in (0, 1, 2):
                make_run(root, method, lr, seed, curve, noise=0.003)
        best = min(rates, key=lambda lr: abs(math.log(lr / curve.best_lr)))
        for seed in (3, 4, 5, 6, 7):
            make_run(root, method, best, seed, curve, noise=0.003, pictures=True, final_set="f" * 16)
    command = "dreamlora compare --optimizers adamw scaled_adamw:variant=split sgd --max_train_steps 150"
    return compare.ComparisonPlan(headline_seeds=range(3, 8), command=command)


def main() -> None:
    """Write the comparison to the folder given, and the example."""
    root = Path(sys.argv[1]) / "adamw-vs-scaled_adamw"
    plan = make_comparison(root)
    found = compare.compare_runs(sorted(folder.parent for folder in root.rglob("config.yaml")), root, plan)
    file = compare.write_comparison(found, root)
    EXAMPLE.write_text(file.read_text(encoding="utf-8"))
    sys.stdout.write(f"{file}\n{EXAMPLE}\n")


if __name__ == "__main__":
    main()
