"""How much of full fine-tuning's gain does LoRA reach? Evaluation loss on held-out images of a subject.

    python benchmarks/lora_vs_full.py --optimizer scaled_adamw

The embedded model learns its default subject, as `dreamlora dreambooth` does it (same preset, images, class images and
stream of samples), once with LoRA and, for every one of --full_learning_rates, once with AdamW on all parameters of the
UNet, and of the text encoder too if the LoRA trains that (unless --denoiser_only). The gain is the fall of eval/loss.
LoRA counts with its last value, full fine-tuning with its best over all steps and rates, which favours the latter.
Flags not listed go to the run: --max_train_steps 100, --seed 1, ...
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _cli
import _machine
import torch
from diffusers.optimization import get_scheduler

from dreamlora.cli.parse import parse_run
from dreamlora.errors import UserError
from dreamlora.metric_names import EVAL_LOSS
from dreamlora.run import assemble
from dreamlora.runfolder import RunFolder
from dreamlora.training import loop
from dreamlora.training.loop import Run

TARGET = 0.9


def losses(folder: RunFolder) -> dict[int, float]:
    """eval/loss by step; a loss that was not finite is infinite.

    Raises:
        UserError: no image was held out, so there is none.
    """
    rows = [row for row in folder.metrics() if row["name"] == EVAL_LOSS]
    if not rows:
        raise UserError("no image was held out: give more images, or --holdout")
    return {row["step"]: math.inf if row["value"] is None else row["value"] for row in rows}


def gain_ratio(lora: dict[int, float], full: list[dict[int, float]]) -> float:
    """(base - LoRA's last) / (base - full's best), from losses by step that begin at step 0.

    Raises:
        UserError: full fine-tuning gained nothing.
    """
    base = lora[0]
    best = min(value for run in full for value in run.values())
    if best >= base:
        raise UserError(f"full fine-tuning did not lower the loss ({base=}, {best=}): give other --full_learning_rates")
    return (base - lora[max(lora)]) / (base - best)


def train(argv: list[str], folder: Path, change: Callable[[Run], None] | None = None) -> dict[str, Any]:
    """Train as the command line says, without samples, checkpoints and report.

    Args:
        argv: flags of `dreamlora dreambooth`.
        folder: of the run.
        change: what is done to the run before its first step.

    Returns:
        ``losses`` by step, ``parameters`` that trained, ``seconds`` of training, ``config``.
    """
    nothing_else = ["--sample_steps", "0", "--checkpointing_steps", "0", "--final_eval_items", "0", "--no_save_best"]
    flags = [*argv, "--output_dir", str(folder), *nothing_else]
    run = assemble.prepare(*parse_run(flags))
    if change:
        change(run)
    started = time.perf_counter()
    try:
        loop.train(run)
    except UserError as error:  # a rate that diverges is a result too
        print(f"{folder.name} stopped: {error}")
    return {
        "losses": losses(run.folder),
        "parameters": sum(parameter.numel() for parameter in run.trainables.values()),
        "seconds": round(time.perf_counter() - started, 1),
        "config": run.config,
    }


def all_parameters(learning_rate: float, denoiser_only: bool) -> Callable[[Run], None]:
    """What turns a LoRA run into full fine-tuning with AdamW of all that the LoRA adapts.

    The adapters stay in their layers, frozen: lora_B is zero, so they add nothing.

    Args:
        denoiser_only: leave a text encoder as it is, though the LoRA adapts it.
    """

    def change(run: Run) -> None:
        model = run.accelerator.unwrap_model(run.model)
        model.requires_grad_(False)
        chosen = model.denoiser if denoiser_only else model
        run.trainables = {name: p for name, p in chosen.named_parameters() if "lora_" not in name}
        for parameter in run.trainables.values():
            parameter.requires_grad_(True)
        optim = run.config.optim
        optimizer = torch.optim.AdamW(
            run.trainables.values(), learning_rate, weight_decay=optim.adam_weight_decay, fused=True
        )
        run.lr_scheduler = get_scheduler(
            optim.lr_scheduler,
            optimizer,
            num_warmup_steps=optim.lr_warmup_steps,
            num_training_steps=run.total_steps,
            num_cycles=optim.lr_num_cycles,
            power=optim.lr_power,
        )
        run.optimizer = run.accelerator.prepare(optimizer)

    return change


def summary(lora: dict[str, Any], full: dict[float, dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """The result as it is written."""
    curves = {rate: found["losses"] for rate, found in full.items()}
    best_rate = min(curves, key=lambda rate: min(curves[rate].values()))
    best_step = min(curves[best_rate], key=lambda step: curves[best_rate][step])
    ratio = gain_ratio(lora["losses"], list(curves.values()))
    config = lora["config"]
    return {
        "command": _machine.command("lora_vs_full.py"),
        "ratio": round(ratio, 4),
        "target": TARGET,
        "passed": ratio >= TARGET,
        "base": lora["losses"][0],
        "lora": {
            "optimizer": config.optim.optimizer,
            "learning_rate": config.optim.learning_rate,
            "rank": config.lora.rank,
            "text_encoder": config.lora.train_text_encoder,
            "final": lora["losses"][max(lora["losses"])],
            "best": min(lora["losses"].values()),
            "losses": lora["losses"],
            **{name: lora[name] for name in ("parameters", "seconds")},
        },
        "full": {
            "best": curves[best_rate][best_step],
            "best_learning_rate": best_rate,
            "best_step": best_step,
            "losses": curves,
            "text_encoder": config.lora.train_text_encoder and not options.denoiser_only,
            "parameters": full[best_rate]["parameters"],
            "seconds": {rate: found["seconds"] for rate, found in full.items()},
        },
        "steps": config.train.max_train_steps,
        "subject": config.data.subject,
        "seed": config.train.seed,
        "machine": _machine.describe(options.threads),
    }


def main() -> None:
    """Parse the flags, train all, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", default="scaled_adamw", help="of the LoRA run")
    parser.add_argument("--full_learning_rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3, 3e-3])
    parser.add_argument("--denoiser_only", action="store_true", help="full fine-tuning leaves the text encoder alone")
    parser.add_argument("--class_data_dir", help="class images from an earlier run, to save the time of making them")
    parser.add_argument("--threads", type=int, default=_machine.usable_cores())
    parser.add_argument("--results", type=Path, default=_machine.RESULTS, help="folder of lora_vs_full.json")
    options, flags = parser.parse_known_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        classes = options.class_data_dir or str(Path(scratch) / "class_images")
        flags = [*flags, "--optimizer", options.optimizer, "--class_data_dir", classes]
        lora = train(flags, Path(scratch) / "lora")
        print(f"LoRA: {_course(lora)}")
        full = {}
        for rate in options.full_learning_rates:
            full[rate] = train(flags, Path(scratch) / f"full-{rate:g}", all_parameters(rate, options.denoiser_only))
            print(f"full fine-tuning, learning rate {rate:g}: {_course(full[rate])}")
    result = summary(lora, full, options)
    print(f"LoRA reaches {result['ratio']:.1%} of full fine-tuning's gain (wanted: {TARGET:.0%})")
    print(f"wrote {_machine.write('lora_vs_full', result, options.results)}")


def _course(found: dict[str, Any]) -> str:
    values = found["losses"]
    best = min(values, key=lambda step: values[step])
    last = values[max(values)]
    return f"{values[0]:.4f} -> {last:.4f} (best {values[best]:.4f} at step {best}), {found['seconds']} s"


if __name__ == "__main__":
    _cli.start(main)
