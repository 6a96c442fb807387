"""What is written at the end of a run: LoRA, parity check, summary and report.

First what needs the model (``conclude``); when that has left the memory, all the rest (``finish``).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from dreamlora import registry
from dreamlora.errors import UserError
from dreamlora.files import replacing_folder, write_atomically
from dreamlora.interrupts import deferred, heed
from dreamlora.lora.pairs import tuned_layers
from dreamlora.memory import ALLOCATED, GIB, in_gib, in_words
from dreamlora.metric_names import EVAL_LOSSES, FINAL_LOSS, GAP, comparable, relative
from dreamlora.models.configs import in_one_line
from dreamlora.models.parts import DTYPES, ROLES, Parts, give_back_memory, watch
from dreamlora.report import write_report
from dreamlora.run import formats, provenance, resume, trackers
from dreamlora.run.context import RunContext
from dreamlora.run.encoding import prompt_length
from dreamlora.run.images import RunImages
from dreamlora.run.upload import push_to_hub
from dreamlora.runfolder import RunFolder
from dreamlora.training import parity, state
from dreamlora.training.loop import Run

FINAL_METRICS = (FINAL_LOSS, relative(FINAL_LOSS), GAP)


@dataclass(frozen=True)
class Conclusion:
    """What is known of a run when its model has gone.

    Attributes:
        images: trained on, by source.
        parameters: of the LoRA.
        pairs: of factors A and B, or layers with an adapter of another kind.
        eval_seconds: that the evaluation loss took.
        ended_early: why, if it did.
        expected: what the saved file must do again; or why that is not checked.
        made: what the run is, for a resume that has nothing left to do.
    """

    images: dict[str, int]
    parameters: int
    pairs: int
    eval_seconds: float
    ended_early: str | None
    expected: parity.ExpectedOutput | str
    made: dict[str, Any]


def conclude(context: RunContext, run: Run, pictures: RunImages) -> Conclusion:
    """Write the LoRA, and keep what the end of the run needs to know. The model cannot train on afterwards.

    With the LoRA there is a summary at once: whatever ends the program from here on, the run counts as made.
    """
    ended = Conclusion(
        images={source.name: len(source.store.names) for source in run.stream.sources},
        parameters=sum(parameter.numel() for parameter in run.trainables.values()),
        pairs=len(list(tuned_layers(run.accelerator.unwrap_model(run.model)))),
        eval_seconds=run.eval_seconds,
        ended_early=run.ended_early,
        expected=resume.UNCHECKED,
        made=resume.made(run, pictures),
    )
    if not run.accelerator.is_main_process:
        return ended
    with deferred():  # without checkpoints this is all that there is of the training
        state.save_lora(run, run.folder.path)
        if run.average:
            with run.average.trained(), replacing_folder(run.folder.raw) as temporary:
                state.save_lora(run, temporary)
        write_summary(context, run.folder, ended, {"reason": resume.UNCHECKED})
    heed()
    return replace(ended, expected=_expected_output(context, run))


def checks_in_base(context: RunContext) -> bool:
    """Whether this process checks the saved file in the base model that it has trained on."""
    train = context.config.train
    return context.accelerator.is_main_process and train.parity_check and train.parity == "lean"


def release(context: RunContext, ended: Conclusion) -> None:
    """Free the model, but for the denoiser if the saved file is checked in it: that is without adapters then."""
    parts = context.parts
    if not checks_in_base(context) or isinstance(ended.expected, str):
        parts.free(*ROLES)
        return
    parts.get("denoiser")[context.family.DENOISER].unload_lora()
    parts.training = ()
    parts.free("text", "vae", "scheduler")


def finish(context: RunContext, folder: RunFolder, ended: Conclusion) -> None:
    """Compare the saved file with what training showed, sum up, write the report, upload if asked to.

    The main process's work alone, of any length: the others have been let go.
    """
    with context.timed("parity check"):
        parity_result = _parity(context, ended.expected)
    if told := in_words(context.memory.peaks()):
        context.tell(told)
    write_summary(context, folder, ended, parity_result)
    give_back_memory()  # the charts' library would come on top of what the check has used
    publish(context, folder)


def publish(context: RunContext, folder: RunFolder) -> None:
    """Write the formats of other programs, and the report, of a run whose summary is there; send and upload what is
    asked for.
    """
    formats.write(context, folder)
    write_report(folder.path)
    trackers.report(context, folder)
    if context.config.train.push_to_hub:
        push_to_hub(context.config, folder)


def write_summary(context: RunContext, folder: RunFolder, ended: Conclusion, parity_result: dict[str, Any]) -> None:
    """summary.json: what the report shows besides options and metrics."""
    device, peaks = context.accelerator.device, context.memory.peaks()
    summary = {
        "parity": parity_result,
        "timings": context.timings,
        "versions": provenance.versions(),
        "device": provenance.device_name(device),
        "peak_memory_gib": _peak_memory(peaks),
        "peak_memory": in_gib(peaks),
        "processes": context.accelerator.num_processes,
        "git_commit": provenance.git_commit(),
        "warnings": context.warnings,
        "data": ended.images,
        "lora": {"parameters": ended.parameters, "pairs": ended.pairs},
        "eval": _eval_rows(folder),
        "best": folder.selection(),
        "final_eval": _final_rows(folder),
        "eval_price": _price(context, ended.eval_seconds),
        "ended_early": ended.ended_early,
        "made": ended.made,
        "command": provenance.command(),
    }
    write_atomically(folder.summary_file, json.dumps(summary, indent=1))


def _price(context: RunContext, seconds: float) -> dict[str, Any]:
    """What the evaluation loss was to cost, and the seconds that it took."""
    price = context.eval_price
    if price is None or not price.forwards:
        return {}
    return {
        "forwards": price.forwards,
        "share": round(price.share, 4),
        "sentence": str(price),
        "seconds": round(seconds, 2),
    }


def _peak_memory(peaks: dict[str, dict[str, int]]) -> float | None:
    """GiB that this process has had allocated on its GPU at most; None on other devices, which do not count."""
    allocated = [kinds[ALLOCATED] for kinds in peaks.values() if ALLOCATED in kinds]
    return round(max(allocated) / GIB, 3) if allocated else None


def _eval_rows(folder: RunFolder) -> dict[str, Any]:
    """First, last and lowest value of the curve; None where the loss was not finite."""
    rows = comparable([row for row in folder.metrics() if row["name"] in EVAL_LOSSES])
    if not rows:
        return {}
    finite = [row for row in rows if row["value"] is not None]
    best = min(finite, key=lambda row: row["value"], default={"value": None, "step": None})
    return {"base": rows[0]["value"], "final": rows[-1]["value"], "best": best["value"], "best_step": best["step"]}


def _final_rows(folder: RunFolder) -> dict[str, dict[str, float | None]]:
    """What was measured on the larger set, by step: value by metric."""
    values: dict[str, dict[str, float | None]] = {}
    for row in folder.metrics():
        if row["name"] in FINAL_METRICS:
            values.setdefault(str(row["step"]), {})[row["name"]] = row["value"]
    return values


def _expected_output(context: RunContext, run: Run) -> parity.ExpectedOutput | str:
    """The first image of the last step, and one call of the denoiser for the same prompt; or why there is none."""
    if not run.config.train.parity_check:
        return "it was switched off (--no_parity_check)"
    rows = [row for row in run.folder.sample_rows() if row["step"] == run.step]
    if not rows:
        return "no samples were drawn at the last step"
    sample = {**rows[0], "negative_prompt": run.config.sample.negative_prompt}
    try:
        call = parity.ask(run, sample["prompt"], prompt_length(context))
    except (UserError, RuntimeError) as error:
        return f"the check could not be made: {error}"
    image = run.folder.samples / sample["file"]
    pairs = registry.load("adapters", run.config.lora.adapter).PAIRS
    return parity.ExpectedOutput(run.folder.path, sample, image, call, context.shown, stock_loader=pairs)


def _parity(context: RunContext, expected: parity.ExpectedOutput | str) -> dict[str, Any]:
    """The figures of the check, or why there are none."""
    if isinstance(expected, str):
        return {"reason": expected}
    accelerator, parts = context.accelerator, context.parts
    try:
        if not checks_in_base(context):
            parts = Parts(context.family, context.source, accelerator.device, DTYPES[accelerator.mixed_precision])
            watch(context.memory, parts)
            return parity.check(parts, expected, full=True)
        changed = parity.bits_of(parts.get("denoiser")[context.family.DENOISER]) != context.base_bits
        return {**parity.check(parts, expected, full=False), "base_changed": changed}
    except Exception as error:  # out of memory, or what a loader stumbles over: the report is still written
        return {"reason": f"the check could not be made: {in_one_line(error)}"}
    finally:
        parts.free(*ROLES)
