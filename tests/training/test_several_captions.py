"""Several captions per image in a run: all are encoded, one is drawn at a time, and a resume knows them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from dreamlora.training.loop import Run


def captioned(photos: Path, folder: Path, *texts: str) -> Path:
    """The photos; the first has these captions."""
    shutil.copytree(photos, folder)
    row = {"file_name": "0.png", "text": list(texts) if len(texts) > 1 else texts[0]}
    (folder / "metadata.jsonl").write_text(json.dumps(row), encoding="utf-8")
    return folder


def test_captions_of_a_run(prepare: Callable[..., Run], photos: Path, sd_folder: Path, tmp_path: Path) -> None:
    def run_on(name: str, *texts: str) -> Run:
        return prepare(
            sd_folder, "--holdout", "0", "--instance_data_dir", str(captioned(photos, tmp_path / name, *texts))
        )

    one, two, other = run_on("one", "first"), run_on("two", "first", "second"), run_on("other", "first", "third")
    [source] = two.stream.sources
    assert source.store.captions[0] == ("first", "second")
    drawn = [source.caption(source.store.captions[0], "instance", position) for position in range(40)]
    assert set(drawn) == {"first", "second"}
    encoded = two.conditioning(["first", "second", "a photo of sks dog"], {})
    assert all(len(rows) == 3 for rows in encoded.values())
    for ours, theirs in zip(one.stream.batches(1, 0), two.stream.batches(1, 0), strict=True):
        assert torch.equal(ours.latents, theirs.latents) and torch.equal(ours.noise, theirs.noise)
    known = [run.settings["training images"] for run in (one, two, other)]
    assert len(set(known)) == 3
