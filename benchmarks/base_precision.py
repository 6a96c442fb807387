"""What do fewer bits of the frozen base cost? Loss curves of bf16, fp8, int8 and nf4 bases beside that of float32.

    python benchmarks/base_precision.py --work base_precision

Two models learn a subject: the embedded one, and a transformer (a small Stable Diffusion 3) that is pretrained first,
on the embedded model's world, as quantisation of weights that nobody trained says nothing. All bases of a model have
the same images, stream of samples, rates and evaluation items. Besides the curve every LoRA is measured in the float32
base, as people use what they trained on a small card. Whatever is done in --work is not done again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import _cli
import _machine
import _tiny_transformer
import torch

from dreamlora.callbacks.evaluate import EvaluateCallback
from dreamlora.cli.parse import parse_run
from dreamlora.lora.saving import save_lora
from dreamlora.metric_names import EVAL_LOSS
from dreamlora.models.loading import family_of, resolve_source
from dreamlora.precision import FORMS, packable
from dreamlora.run import assemble
from dreamlora.runfolder import RunFolder
from dreamlora.tiny import subjects
from dreamlora.training import loop
from dreamlora.training.loop import Run

FULL = "float32"
WORDS = (FULL, *FORMS)
MODELS = ("embedded", "transformer")
SUBJECT, IMAGES, HELD_OUT = "checkerling", 24, 8
SAME = (
    "--learning_rate 2e-3 --lr_scheduler cosine --lr_warmup_steps 10 --rank 8 --train_batch_size 4 --resolution 64 "
    "--mixed_precision no --sample_steps 0 --checkpointing_steps 0 --final_eval_items 0 --no_save_best"
)
"""Flags of all runs."""
OWN = {
    "embedded": "--no_train_text_encoder --no_with_prior_preservation",
    "transformer": f"--lora_layers attn-mlp --max_sequence_length {_tiny_transformer.T5_LENGTH}",
}


def losses(folder: RunFolder) -> dict[int, float]:
    """The evaluation loss by step."""
    return {row["step"]: row["value"] for row in folder.metrics() if row["name"] == EVAL_LOSS}


def trained(flags: Sequence[str], word: str, folder: Path) -> dict[str, Any]:
    """A run on a base in this precision: its curve, and its LoRA's loss in the float32 base. Once made it is read.

    Args:
        flags: of ``dreamlora dreambooth``, without folder and precision.
        word: of WORDS.
        folder: of the run.
    """
    file = folder / "result.json"
    if not file.exists():
        precision = [] if word == FULL else ["--base_precision", word]
        run = _prepared([*flags, *precision], folder / "run")
        started = time.perf_counter()
        loop.train(run)
        found = {"losses": losses(run.folder), "seconds": round(time.perf_counter() - started, 1)}
        denoiser = run.accelerator.unwrap_model(run.model).denoiser
        lora = save_lora(run.folder.path, {run.family.DENOISER: denoiser})
        used = _prepared([*flags, "--init_lora", str(lora)], folder / "used")
        next(each for each in used.callbacks if isinstance(each, EvaluateCallback)).on_start(used)
        found["loss_in_float32"] = losses(used.folder)[0]
        file.write_text(json.dumps(found, indent=2), encoding="utf-8")
    read: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return {**read, "losses": {int(step): value for step, value in read["losses"].items()}}


def _prepared(flags: list[str], folder: Path) -> Run:
    return assemble.prepare(*parse_run([*flags, "--output_dir", str(folder), "--overwrite_output_dir"]))


def weight_error(word: str, weights: Mapping[str, torch.Tensor]) -> float:
    """Of the matrices as they are stored, relative: ``‖W' − W‖ / ‖W‖`` over all of them."""
    form = FORMS[word]
    squares = [
        ((form.unpack(form.pack(W), W.shape, W.dtype) - W).square().sum(), W.square().sum()) for W in weights.values()
    ]
    return float((sum(error for error, _ in squares) / sum(size for _, size in squares)) ** 0.5)


def summary(runs: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> dict[str, dict[str, float]]:
    """What is told of every precision: means over the seeds, and the cost in parts of what the float32 base gains.

    Args:
        runs: of one model, by precision and seed.
    """
    first, last = ({seed: _at(run, at) for seed, run in runs[FULL].items()} for at in (min, max))
    gain = statistics.mean(first[seed] - last[seed] for seed in first)
    found = {}
    for word, by_seed in runs.items():
        costs = {
            "before": [_at(run, min) / first[seed] - 1 for seed, run in by_seed.items()],
            "trained": [(_at(run, max) - last[seed]) / gain for seed, run in by_seed.items()],
            "used": [(run["loss_in_float32"] - last[seed]) / gain for seed, run in by_seed.items()],
        }
        found[word] = {
            "loss_before": statistics.mean(_at(run, min) for run in by_seed.values()),
            "loss": statistics.mean(_at(run, max) for run in by_seed.values()),
            "loss_in_float32": statistics.mean(run["loss_in_float32"] for run in by_seed.values()),
            **{f"cost_{name}": statistics.mean(values) for name, values in costs.items()},
            "cost_used_least": min(costs["used"]),
            "cost_used_most": max(costs["used"]),
            "seconds": statistics.mean(run["seconds"] for run in by_seed.values()),
        }
    return {word: {name: round(value, 5) for name, value in each.items()} for word, each in found.items()}


def _at(run: Mapping[str, Any], end: Any) -> float:
    return float(run["losses"][end(run["losses"])])


def table(result: Mapping[str, Any]) -> str:
    """For the documents."""
    rows = [
        "| Base | Weights are off by | Loss before, after | After, used in float32 | Cost |",
        "|---|---|---|---|---|",
    ]
    for model, found in result["models"].items():
        for word, each in found["summary"].items():
            off = found["weight_errors"].get(word)
            rows.append(
                f"| {model}, {word} | {'' if off is None else f'{100 * off:.2f} %'} | {each['loss_before']:.4f}, "
                f"{each['loss']:.4f} | {each['loss_in_float32']:.4f} | {100 * each['cost_used']:+.1f} % |"
            )
    return "\n".join(rows)


def draw(result: Mapping[str, Any], file: Path) -> None:
    """The curves of all bases side by side, each the mean of its seeds, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, (model, found) in zip(
        figure.subplots(1, len(result["models"]), squeeze=False)[0], result["models"].items(), strict=True
    ):
        for word, runs in found["runs"].items():
            steps = [int(step) for step in next(iter(runs.values()))["losses"]]
            curves = [list(run["losses"].values()) for run in runs.values()]
            style = {"linewidth": 3.5, "color": "0.75"} if word == FULL else {"linewidth": 1.3}
            axes.plot(steps, [statistics.mean(values) for values in zip(*curves, strict=True)], label=word, **style)
        axes.set(title=f"{model}", xlabel="step", ylabel="evaluation loss, on its own base")
        axes.legend()
    figure.savefig(file, dpi=110)


def measured(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """All runs of one model."""
    images = options.work / "images"
    if not images.exists():
        subjects.write_instance_images(images, SUBJECT, IMAGES)
    about: dict[str, Any] = {}
    flags = [*SAME.split(), *OWN[model].split(), "--max_train_steps", str(options.steps)]
    flags += ["--instance_data_dir", str(images), "--holdout", str(HELD_OUT)]
    flags += ["--instance_prompt", subjects.instance_prompt(SUBJECT), "--eval_steps", str(max(1, options.steps // 6))]
    if model == "transformer":
        place, about = _tiny_transformer.made(options.work, options.pretraining_steps)
        flags += ["--pretrained_model_name_or_path", str(place)]
    runs: dict[str, dict[int, dict[str, Any]]] = {word: {} for word in WORDS}
    for seed in options.seeds:
        for word in WORDS:
            folder = options.work / f"{model}-{options.steps}-{seed}-{word}"
            found = runs[word][seed] = trained([*flags, "--seed", str(seed)], word, folder)
            print(f"{folder.name}: {found['losses'][0]:.4f} -> {_at(found, max):.4f}, {found['seconds']} s", flush=True)
    weights = _linear_weights(flags)
    return {
        "pretraining": about,
        "weight_errors": {word: round(weight_error(word, weights), 5) for word in FORMS},
        "summary": summary(runs),
        "runs": runs,
    }


def _linear_weights(flags: Sequence[str]) -> dict[str, torch.Tensor]:
    """Those that ``--base_precision`` packs."""
    source = resolve_source(parse_run([*flags])[0].model)
    family = family_of(source)
    denoiser = family.load(source, "denoiser", torch.float32)[family.DENOISER]
    return {name: layer.weight.detach() for name, layer in packable(denoiser)}


def main() -> None:
    """Parse the flags, train all, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder of the pretrained transformer and of all runs")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--pretraining_steps", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=_machine.usable_cores())
    parser.add_argument("--results", type=Path, default=_machine.RESULTS, help="folder of base_precision.json")
    parser.add_argument("--plot", type=Path, nargs=2, metavar=("JSON", "PICTURE"), help="draw a result's curves alone")
    options = parser.parse_args()
    if options.plot:
        draw(json.loads(options.plot[0].read_text(encoding="utf-8")), options.plot[1])
        return
    if not options.work:
        parser.error("--work FOLDER is needed")
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    result = {
        "command": _machine.command("base_precision.py"),
        "settings": {"steps": options.steps, "seeds": options.seeds, "flags": SAME, "own_flags": OWN},
        "models": {model: measured(model, options) for model in options.models},
        "machine": _machine.describe(options.threads),
    }
    print(table(result))
    print(f"wrote {_machine.write('base_precision', result, options.results)}")


if __name__ == "__main__":
    _cli.start(main)
