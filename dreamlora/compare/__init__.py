"""Run folders become compare.json: which optimizer is better, each at its own best learning rate, and how sure that is.

Needs no torch. The fields of compare.json are in ``schema``, the formulas in ``stats``.
"""

from dreamlora.compare.comparison import COMPARE_FILE, ComparisonPlan, compare_runs, write_comparison

__all__ = ["COMPARE_FILE", "ComparisonPlan", "compare_runs", "write_comparison"]
