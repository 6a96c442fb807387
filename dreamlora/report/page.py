"""The report's two files from their templates."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dreamlora import __version__
from dreamlora.report import charts, pictures, words
from dreamlora.report.facts import Facts
from dreamlora.runfolder import RunFolder, write_atomically

_FILES = (
    ("pytorch_lora_weights.safetensors", "the LoRA, as diffusers, ComfyUI and others load it"),
    ("config.yaml", "every option of the run"),
    ("metrics.jsonl", "every number, one per line"),
    ("grid.png", "the grid in full size"),
    ("timelapse.webp", "the samples as an animation"),
    ("samples", "every sample as it was drawn"),
    ("checkpoints", "to go on from, or to go back to"),
)


def write_report(run: RunFolder | Path | str) -> Path:
    """Write report.html and report.md of a run, finished or not; the path of the former.

    Raises:
        UserError: the folder holds no run.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    folder = run if isinstance(run, RunFolder) else RunFolder(Path(run))
    content = _content(Facts(folder))
    environment = Environment(
        loader=PackageLoader("dreamlora.report"),
        autoescape=lambda name: name is not None and ".html" in name,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["md"] = _markdown
    for file, template in ((folder.report_md, "report.md.j2"), (folder.report_html, "report.html.j2")):
        write_atomically(file, environment.get_template(template).render(content))
    return folder.report_html


def _content(facts: Facts) -> dict[str, Any]:
    folder = facts.folder
    timings = words.seconds_of(facts)
    total = sum(seconds for _, seconds in timings)
    return {
        "facts": facts,
        "headline": words.headline(facts),
        "spread": words.spread(facts),
        "setup": words.setup(facts),
        "numbers": words.numbers(facts),
        "parity": words.parity(facts),
        "changed": facts.options[0],
        "unchanged": facts.options[1],
        "timings": [(stage, words.duration(s), 100 * s / total if total else 0) for stage, s in timings],
        "versions": facts.summary.get("versions") or {},
        "grid": pictures.embedded(folder.grid_file),
        "references": pictures.references(folder.reference_dir),
        "timelapse": pictures.timelapse(folder.timelapse_file),
        "files": [(name, text) for name, text in _FILES if (folder.path / name).exists()],
        "evaluation_chart": charts.evaluation_chart(facts),
        "training_chart": charts.training_chart(facts),
        "rate_chart": charts.rate_chart(facts),
        "program": f"dreamlora {__version__}",
    }


def _markdown(value: Any) -> str:
    """Text that Markdown leaves as it is, also in a table."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", " ".join(str(value).split()))
