"""The report of one run: its two files from their templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dreamlora.report import charts, pictures, words
from dreamlora.report.document import PAGE, TEXT, Document, filled
from dreamlora.report.facts import RunFacts, SharedFacts, require_run
from dreamlora.runfolder import RunFolder

_FILES = (
    ("pytorch_lora_weights.safetensors", "the LoRA, as diffusers loads it"),
    ("raw", "the last step's LoRA without the moving average"),
    ("best", "the best checkpoint's LoRA, and why it is the best"),
    ("config.yaml", "every option of the run"),
    ("learning_rate_test.json", "the rates that were tried, and why this one was taken"),
    ("metrics.jsonl", "every number, one per line"),
    ("grid.png", "the grid in full size"),
    ("timelapse.webp", "the samples as an animation"),
    ("samples", "every sample as it was drawn"),
    ("checkpoints", "to go on from, or to go back to"),
)


def run_document(run: RunFolder | Path | str) -> Document:
    """The report of a run, finished or not.

    Raises:
        UserError: the folder holds no run.
    """
    folder = run if isinstance(run, RunFolder) else RunFolder(Path(run))
    require_run(folder)
    sources = (
        folder.metrics_file,
        folder.summary_file,
        folder.config_file,
        folder.eval_items_file,
        folder.raw_items_file,
    )
    pictures_ = (folder.samples_file, folder.grid_file, folder.timelapse_file)

    def render() -> dict[str, str]:
        content = _content(RunFacts(folder))
        return {TEXT: filled("report.md.j2", content), PAGE: filled("report.html.j2", content)}

    return Document(folder.path, sources + pictures_, tuple(name for name, _ in _FILES), render)


def shared_report(folder: RunFolder) -> tuple[str, str]:
    """The report of a run for others' eyes, as HTML and as Markdown: without photos, places of this machine and files
    beside it.
    """
    content = {**_content(SharedFacts(folder)), "references": [], "files": []}
    return filled("report.html.j2", content), filled("report.md.j2", {**content, "grid": None})


def _content(facts: RunFacts) -> dict[str, Any]:
    folder = facts.folder
    timings = words.seconds_of(facts)
    total = sum(seconds for _, seconds in timings)
    return {
        "facts": facts,
        "headline": words.headline(facts),
        "spread": words.spread(facts),
        "setup": words.setup(facts),
        "numbers": words.numbers(facts),
        "ended_early": facts.summary.get("ended_early"),
        "average": words.average(facts),
        "best": words.best(facts),
        "final_table": words.final_table(facts),
        "range_test": facts.range_test.get("reason"),
        "range_table": words.range_table(facts),
        "image_table": words.image_table(facts),
        "image_charts": charts.image_charts(facts),
        "parity": words.parity(facts),
        "changed": facts.options[0],
        "unchanged": facts.options[1],
        "timings": [(stage, words.duration(s), 100 * s / total if total else 0) for stage, s in timings],
        "memory": words.peaks_of(facts),
        "versions": facts.summary.get("versions") or {},
        "grid": pictures.embedded(folder.grid_file, inside=folder.path),
        "references": pictures.references(folder.reference_dir, folder.path),
        "timelapse": pictures.timelapse(folder.timelapse_file, folder.path),
        "files": [(name, text) for name, text in _FILES if (folder.path / name).exists()],
        "evaluation_chart": charts.evaluation_chart(facts),
        "evaluation_price": words.evaluation_price(facts),
        "training_chart": charts.training_chart(facts),
        "rate_chart": charts.rate_chart(facts),
        "health": words.health(facts),
        "change_chart": charts.change_chart(facts),
        "update_chart": charts.update_chart(facts),
    }
