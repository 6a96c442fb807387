"""The check at the end of a run where the stock pipeline cannot make of a prompt what training did."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dreamlora.runfolder import RunFolder
from tests import tinymodels

pytestmark = pytest.mark.usefixtures("no_report")

SHORT = "--max_train_steps 2 --sample_steps 2 --eval_steps 0 --final_eval_items 0 --num_inference_steps 1"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tinymodels.of("flux2").save(tmp_path_factory.mktemp("models") / "flux2")


@pytest.mark.parametrize(
    "more",
    ["--negative_prompt blurry", "--text_encoder_out_layers 10 20 28", "--max_sequence_length 128"],
)
def test_it_is_given_embeddings(folder: Path, train: Callable[..., RunFolder], more: str) -> None:
    run = train("--pretrained_model_name_or_path", str(folder), *SHORT.split(), *more.split())
    parity = json.loads(run.summary_file.read_text(encoding="utf-8"))["parity"]
    assert parity["call"]["error"] < 1e-2 and parity["max_abs"] <= 2, parity
