"""What is written around the training: the config at its start; LoRA, parity check, summary and report at its end."""

from __future__ import annotations

import json
from typing import Any

import torch

from dreamlora.errors import UserError
from dreamlora.metric_names import EVAL_LOSSES, FINAL_LOSS, GAP, relative
from dreamlora.models.parts import DTYPES, Parts, give_back_memory
from dreamlora.report import write_report
from dreamlora.run import provenance
from dreamlora.run.context import RunContext
from dreamlora.run.upload import push_to_hub
from dreamlora.runfolder import RunFolder, read_jsonl, write_atomically
from dreamlora.training import parity, state
from dreamlora.training.loop import Run

FINAL_METRICS = (FINAL_LOSS, relative(FINAL_LOSS), GAP)


def finish(context: RunContext, run: Run) -> None:
    """Write the LoRA, compare it with what training showed, sum up, write the report, upload if asked to."""
    if run.accelerator.is_main_process:
        state.save_lora(run, run.folder.path)
        with context.timed("parity check"):
            found = _parity(context, run)
        write_summary(context, run, found)
        give_back_memory()  # the charts' library would come on top of what training has used
        write_report(run.folder.path)
        if context.config.train.push_to_hub:
            push_to_hub(run)
    run.accelerator.wait_for_everyone()
    run.accelerator.end_training()


def write_summary(context: RunContext, run: Run, found: dict[str, Any]) -> None:
    """summary.json: what the report shows besides options and metrics."""
    metric = _eval_rows(run.folder)
    trained = sum(parameter.numel() for parameter in run.trainables.values())
    summary = {
        "parity": found,
        "timings": context.timings,
        "versions": provenance.versions(),
        "device": provenance.device_name(run.accelerator.device),
        "peak_memory_gib": _peak_memory(run.accelerator.device),
        "processes": run.accelerator.num_processes,
        "git_commit": provenance.git_commit(),
        "warnings": context.warnings,
        "data": {source.name: len(source.store.names) for source in run.stream.sources},
        "lora": {"parameters": trained, "pairs": len(run.trainables) // 2},
        "eval": metric,
        "best": run.folder.selection(),
        "final_eval": _final_rows(run.folder),
        "eval_price": _price(context, run),
        "ended_early": run.ended_early,
        "command": provenance.command(),
    }
    write_atomically(run.folder.summary_file, json.dumps(summary, indent=1))


def _price(context: RunContext, run: Run) -> dict[str, Any]:
    """What the evaluation loss was to cost, and the seconds that it took."""
    price = context.eval_price
    if price is None or not price.forwards:
        return {}
    return {
        "forwards": price.forwards,
        "share": round(price.share, 4),
        "sentence": str(price),
        "seconds": round(run.eval_seconds, 2),
    }


def _peak_memory(device: torch.device) -> float | None:
    """GiB that this process has had allocated on its GPU at most; None on other devices, which do not count."""
    return round(torch.cuda.max_memory_allocated(device) / 2**30, 3) if device.type == "cuda" else None


def _eval_rows(folder: RunFolder) -> dict[str, Any]:
    rows = [row for row in folder.metrics() if row["name"] in EVAL_LOSSES]
    if not rows:
        return {}
    best = min(rows, key=lambda row: row["value"])
    return {"base": rows[0]["value"], "final": rows[-1]["value"], "best": best["value"], "best_step": best["step"]}


def _final_rows(folder: RunFolder) -> dict[str, dict[str, float]]:
    """What was measured on the larger set, by step: value by metric."""
    found: dict[str, dict[str, float]] = {}
    for row in folder.metrics():
        if row["name"] in FINAL_METRICS:
            found.setdefault(str(row["step"]), {})[row["name"]] = row["value"]
    return found


def _parity(context: RunContext, run: Run) -> dict[str, Any]:
    """Compare the last sample of the first prompt with what a fresh stock pipeline draws from the saved file."""
    rows = [row for row in read_jsonl(run.folder.samples_file) if row["step"] == run.step]
    if not rows:
        return {"reason": "no samples were drawn at the last step"}
    run.components.clear()  # the models of the training make room for the fresh pipeline
    run.model.cpu()
    context.parts.free("denoiser", "vae", "text", "scheduler")
    fresh = Parts(context.family, context.source, run.accelerator.device, DTYPES[run.accelerator.mixed_precision])
    sample = {**rows[0], "negative_prompt": run.config.sample.negative_prompt}
    try:
        return parity.check(fresh.pipeline(), run.folder.path, sample, run.folder.samples / sample["file"])
    except (UserError, OSError, RuntimeError, ValueError) as error:  # out of memory, ...: the report is still written
        return {"reason": f"the check could not be made: {error}"}
