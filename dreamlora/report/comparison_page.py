"""The report of a comparison: its files from compare.json and the sample images that it names."""

from __future__ import annotations

from pathlib import Path

from dreamlora.compare.schema import COMPARE_FILE
from dreamlora.escapes import inner_path, script_json
from dreamlora.report import comparison_charts, comparison_tables
from dreamlora.report.comparison import ComparisonFile, without_secrets
from dreamlora.report.comparison_samples import gallery
from dreamlora.report.document import PAGE, TEXT, Document, filled

_PLOTS = "plots"


def comparison_document(folder: Path) -> Document:
    """The report of a folder that holds compare.json.

    Raises:
        UserError: it holds none.
    """
    comparison = ComparisonFile(folder)

    def render() -> dict[str, str]:
        return _files(ComparisonFile(folder))

    reports = (inner_path(run["report"]) for run in comparison.runs)
    linked = sorted({path.parts[0] for path in reports if path})
    return Document(folder, (comparison.file,), (COMPARE_FILE, _PLOTS, *linked), render)


def _files(comparison: ComparisonFile) -> dict[str, str]:
    charts = comparison_charts.all_of(comparison)
    content = {
        "comparison": comparison,
        "charts": charts,
        "tables": comparison_tables.all_of(comparison),
        "colours": [comparison_charts.colour(number) for number in range(len(comparison.methods))],
        "gallery": gallery(comparison),
        "plots": _PLOTS,
        "data": script_json(without_secrets(comparison.raw)),
    }
    files = {f"{_PLOTS}/{name}.svg": chart.file for name, chart in charts.items()}
    return {**files, TEXT: filled("comparison.md.j2", content), PAGE: filled("comparison.html.j2", content)}
