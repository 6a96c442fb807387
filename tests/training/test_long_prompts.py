"""Captions that are longer than the text encoder reads, in a complete run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dreamlora.errors import UserError
from dreamlora.runfolder import RunFolder
from tests.training.conftest import train_with
from tests.training.test_run import same, weights

Train = Callable[..., RunFolder]
BEGINNING = "abcdefghijklmn"  # all that the small text encoder reads, whose tokens are letters


def test_captions_that_are_cut_are_counted_in_one_line_and_named_in_the_report(
    train: Train, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(photos, tmp_path / "captioned")
    (folder / "3.txt").write_text(BEGINNING + "o", encoding="utf-8")
    (folder / "5.txt").write_text(BEGINNING + "opq", encoding="utf-8")
    (folder / "6.txt").write_text(BEGINNING, encoding="utf-8")
    flags = ["--instance_data_dir", str(folder), "--instance_prompt", "a", "--validation_prompt", "z" * 20]
    with caplog.at_level("INFO"):
        run = train(*flags)
        again = train(*flags, "--output_dir", str(tmp_path / "again"))  # all of them are in the cache by now
    told = [record.getMessage() for record in caplog.records if "tokens" in record.getMessage()]
    line = "3 captions or prompts have more than 16 tokens: what is beyond does not count"
    assert len(told) == 2 and all(text.startswith(line) and BEGINNING not in text for text in told)
    for folder_of_run in (run, again):
        report = folder_of_run.report_md.read_text(encoding="utf-8")
        assert "of 3.png, of 5.png" in report and "z" * 20 in report and "6.png" not in report.split(line)[1][:200]


def test_what_is_beyond_counts_in_chunks(train: Train, tmp_path: Path) -> None:
    def trained(name: str, prompt: str, *more: str) -> RunFolder:
        return train("--instance_prompt", prompt, "--output_dir", str(tmp_path / name), "--sample_steps", "6", *more)

    first, second = trained("first", BEGINNING + "xyz"), trained("second", BEGINNING + "zyx")
    assert same(weights(first), weights(second))
    chunks = ["--max_token_length", "28"]
    whole, other = (trained(name, BEGINNING + name, *chunks) for name in ("xyz", "zyx"))
    assert not same(weights(whole), weights(other))
    assert json.loads(whole.summary_file.read_text(encoding="utf-8"))["parity"]["max_abs"] <= 1
    again = train_with(["--config", str(whole.config_file), "--output_dir", str(tmp_path / "again")])
    assert same(weights(whole), weights(again))


def test_only_clip_reads_in_chunks(flux_folder: Path, train: Train) -> None:
    with pytest.raises(UserError, match=r"--max_token_length is for models whose prompts CLIP reads.*--max_sequence_l"):
        train("--pretrained_model_name_or_path", str(flux_folder), "--max_token_length", "150")


def test_lengths_that_contradict_each_other_are_refused(train: Train) -> None:
    with pytest.raises(UserError, match="give either --max_token_length or --tokenizer_max_length"):
        train("--max_token_length", "28", "--tokenizer_max_length", "16")
