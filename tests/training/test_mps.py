"""A complete run on Apple silicon with what is on by default: health, evaluation loss, samples, checkpoint, parity."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from accelerate.state import AcceleratorState

from dreamlora.runfolder import RunFolder
from tests.fakemps import MPS, FakeMps


@pytest.fixture
def mps(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", str(MPS))
    with FakeMps():
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_run_ends_well_and_the_numbers_are_those_of_the_cpu(
    train: Callable[..., RunFolder], request: pytest.FixtureRequest
) -> None:
    flags = "--max_train_steps 1 --num_inference_steps 1 --sample_steps 1 --eval_steps 1 --final_eval_items 0"
    here = train(*flags.split()).metrics()
    request.getfixturevalue("mps")
    run = train(*flags.split(), "--overwrite_output_dir")
    assert run.lora_file.exists()
    there = {(row["name"], row["step"]): row["value"] for row in run.metrics()}
    names = {"lora/dw_norm", "lora/stable_rank", "lora/balance", "opt/update_rms", "eval/loss", "train/loss"}
    assert {name for name, _ in there} >= names
    for row in here:
        if row["name"] in names:
            assert there[row["name"], row["step"]] == pytest.approx(row["value"], rel=1e-4)
