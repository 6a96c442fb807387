"""The step alone, in the forms of a model: on the smallest models, whether the program works and what it compares."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.benchmarks.test_benchmarks import load

steps = load("gpu_steps")


def test_blocks_that_wait_give_the_same_losses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cases = ["flux-fp8", "flux-fp8-offload40", "flux-bare"]
    words = ["--tiny", "--device", "cpu", "--steps", "3", "--results", str(tmp_path), "--cases", *cases]
    monkeypatch.setattr("sys.argv", ["gpu_steps.py", *words])
    steps.main()
    [file] = tmp_path.iterdir()
    found = json.loads(file.read_text(encoding="utf-8"))
    assert list(found["forms"]) == cases and not any("failed" in one for one in found["forms"].values())
    assert found["compared"]["flux-fp8-offload40"]["same_losses"]
    assert all(len(one["losses"]) == 3 and one["peak_gib"] is None for one in found["forms"].values())


def test_what_fails_leaves_the_others() -> None:
    found = {"flux-nf4": {"failed": "no memory"}, "flux": {"median_ms": 2.0, "losses": [1.0]}}
    found["flux-offload40"] = {"median_ms": 4.0, "losses": [1.5]}
    assert dict(steps.compared(found)) == {"flux-offload40": {"beside": "flux", "speed": 0.5, "same_losses": False}}


def test_every_form_is_compared_with_one_of_its_own_model() -> None:
    for name, form in steps.FORMS.items():
        other = steps.FORMS.get(form.beside)
        assert form.beside is None or (other.model, other.batch, other.rank) == (form.model, form.batch, form.rank), (
            name
        )
        assert replace(form, bare=True) != form or form.base is None, "diffusers' own is in bf16"
