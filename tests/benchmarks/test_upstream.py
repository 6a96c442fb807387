"""What docs/upstream.md says of PEFT: figures are those of the committed result, snippets print what it says."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import pytest
import torch

from tests.benchmarks.test_benchmarks import load
from tests.benchmarks.test_documents import ROOT, assert_told, results, table

PAGE = "docs/upstream.md"
TEXT = (ROOT / PAGE).read_text(encoding="utf-8")
SNIPPETS = [textwrap.dedent(block) for block in re.findall(r"\n\n((?: {4}.*\n|\n)+)", TEXT) if "import" in block]


def test_the_damping() -> None:
    found = results("peft_riemannian")["damping"]
    assert (found["rate"], found["seeds"]) == (0.001, 3)
    rows = table(PAGE, "Damping")
    assert len(rows) == len(found["optimizers"])
    for cells, row in zip(rows.values(), found["optimizers"].values(), strict=True):
        values = [*row["step_of_A"].values(), row["loss"]]
        for cell, value in zip(cells, values, strict=True):
            assert_told(cell, value)
    assert [name.split()[-1] for name in list(found["optimizers"])[1:4]] == ["1e-06", "0.0001", "0.01"]


def test_the_convolutions() -> None:
    found = results("peft_riemannian")["kernels"]
    assert f"{found['sd15']['found']} of {found['sd15']['pairs']} pairs are found" in TEXT
    assert f"{found['difference']['peft']:.2f} times as far" in TEXT
    assert f"agree to {found['difference']['changed']:.0e}".replace("e-0", "e-") in TEXT


def test_the_loop() -> None:
    found, rows = results("peft_riemannian")["loop_ms"], table(PAGE, "Rank")
    assert rows.keys() == found.keys()
    for rank, cells in rows.items():
        for cell, value in zip(cells, found[rank].values(), strict=True):
            assert_told(cell, value)


def test_the_variants() -> None:
    found, rows = results("peft_riemannian")["other_products"], table(PAGE, "Layer")
    order = ("plain", "experts", "BD-LoRA, A", "KaSA", "BD-LoRA, B")
    assert len(rows) == len(found)
    for (name,), key in zip(rows.values(), order, strict=True):
        value = found[key]
        if isinstance(value, str):
            assert "shapes cannot be multiplied" in value and name == "stops"
        else:
            assert_told(name, value)


@pytest.mark.parametrize("number", range(4))
def test_the_snippets_show_what_they_say(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Should one fail after an update of PEFT, it may have taken the change."""
    snippet = SNIPPETS[number]
    told = snippet.rpartition("# ")[2].strip()
    names: dict[str, Any] = {}
    if told.startswith("RuntimeError"):
        with pytest.raises(RuntimeError, match=re.escape(told.removeprefix("RuntimeError: "))):
            exec(snippet, names)
    else:
        exec(snippet, names)
        assert capsys.readouterr().out.split() == told.replace(",", "").split()


def test_the_changes_do_what_peft_does_but_for_the_damping() -> None:
    """With one pair of matrices whose Gram matrices have a mean eigenvalue of 1 the two dampings are one."""
    bench = load("peft_riemannian")
    steps = []
    for kind in (bench.riemannian._RiemannianPreconditioner, bench.Changed):
        torch.manual_seed(0)
        A, B = torch.nn.Parameter(torch.randn(3, 7)), torch.nn.Parameter(torch.randn(5, 3))
        with torch.no_grad():
            for p in (A, B):
                p.mul_((3 / p.square().sum()).sqrt())
        A.grad, B.grad = torch.ones_like(A), torch.ones_like(B)
        kind([(A, B)], 0.1).step()
        steps.append((A.grad, B.grad))
    for peft, changed in zip(*steps, strict=True):
        torch.testing.assert_close(peft, changed)


def test_a_small_run_of_the_benchmark() -> None:
    bench = load("peft_riemannian")
    found = bench.measure_damping(seeds=1, steps=2)["optimizers"]
    assert len(found) == 5 and all(row["step_of_A"].keys() == {2} for row in found.values())
    assert bench.measure_kernels()["difference"]["changed"] < 1e-4
    assert bench.measure_loop([2], 1)["2"].keys() == {"peft", "cholesky", "changed"}
