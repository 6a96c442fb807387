"""A run folder becomes report.html (one file, no network, no scripts) and report.md; needs no torch."""

from dreamlora.report.page import write_report

__all__ = ["write_report"]
