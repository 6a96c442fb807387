"""A run or a comparison of runs becomes report.html (one file, no network) and report.md; needs no torch."""

from __future__ import annotations

from pathlib import Path

from dreamlora.compare.schema import COMPARE_FILE
from dreamlora.report.comparison_page import comparison_document
from dreamlora.report.document import Document
from dreamlora.report.page import run_document, shared_report
from dreamlora.runfolder import RunFolder

__all__ = ["document_of", "shared_report", "write_compare_report", "write_report"]


def document_of(folder: Path) -> Document:
    """The report of a folder, whatever lies in it: a comparison or a run.

    Raises:
        UserError: it holds neither.
    """
    return comparison_document(folder) if (folder / COMPARE_FILE).exists() else run_document(folder)


def write_report(run: RunFolder | Path | str) -> Path:
    """Write report.html and report.md of a run, finished or not; the path of the former.

    Raises:
        UserError: the folder holds no run.
    """
    return run_document(run).write()


def write_compare_report(folder: Path) -> Path:
    """Write report.html, report.md and plots/*.svg of a comparison; the path of the first.

    Args:
        folder: holds compare.json; pictures that it names may lie anywhere.

    Raises:
        UserError: there is no compare.json, or it is damaged or of another version.
    """
    return comparison_document(folder).write()
