"""--compile through the public command: the same training, and the same bits again after an interruption."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.training.test_resume import Train, assert_equal_runs, interrupt_after, pictures
from tests.training.test_run import values

pytestmark = [
    pytest.mark.usefixtures("no_report"),
    pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler"),
]
SHORT = ["--max_train_steps", "4", "--sample_steps", "2", "--eval_steps", "2", "--final_eval_items", "8"]


@pytest.fixture(autouse=True)
def graphs_of_this_test_alone() -> Iterator[None]:
    torch._dynamo.reset()
    limits = {name: getattr(torch._dynamo.config, name) for name in ("recompile_limit", "accumulated_recompile_limit")}
    with torch._dynamo.config.patch(limits), torch._inductor.config.patch(compile_threads=1):
        yield
    torch._dynamo.reset()


def test_a_compiled_run_is_the_same_training_and_resumes_with_the_same_bits(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*SHORT, "--gradient_checkpointing"]
    plain = train(*flags, "--output_dir", str(tmp_path / "plain" / "run"))
    whole = train(*flags, "--compile", "--output_dir", str(tmp_path / "whole" / "run"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 3)
        train(*flags, "--compile")
    assert_equal_runs(train(*flags, "--compile", "--resume_from_checkpoint", "latest"), whole)

    computed, expected = ({(step, name): value for step, name, value in values(run)} for run in (whole, plain))
    assert computed == pytest.approx(expected, rel=1e-3)
    first = "step_000000"
    assert {name: file for name, file in pictures(whole).items() if first in name} == {
        name: file for name, file in pictures(plain).items() if first in name
    }
