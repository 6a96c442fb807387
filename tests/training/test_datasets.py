"""Runs on several data sets, given by a list in a --config file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from dreamlora.cli.parse import parse_run
from dreamlora.errors import UserError
from dreamlora.runfolder import RunFolder
from dreamlora.training import loop
from tests.training.conftest import train_with
from tests.training.test_run import same, weights

pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture
def common(flags: list[str]) -> list[str]:
    """A run without its images and its prompt."""
    left = list(flags)
    for flag in ("--instance_data_dir", "--instance_prompt"):
        place = left.index(flag)
        del left[place : place + 2]
    return [*left, "--sample_steps", "0", "--holdout", "2"]


@pytest.fixture
def parks(tmp_path: Path) -> Path:
    """Four more pictures, and masks of two of them."""
    (tmp_path / "parks").mkdir()
    (tmp_path / "masks").mkdir()
    pixels = np.random.default_rng(5).integers(0, 255, (4, 32, 32, 3), dtype=np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / "parks" / f"{number}.png")
    for number in range(2):
        mask = Image.new("L", (32, 32))
        mask.paste(255, (0, 0, 16, 32))
        mask.save(tmp_path / "masks" / f"{number}.png")
    return tmp_path / "parks"


def listed(file: Path, *entries: dict[str, Any], **more: Any) -> list[str]:
    """--config with these data sets."""
    plain = [{key: str(value) if isinstance(value, Path) else value for key, value in e.items()} for e in entries]
    file.write_text(yaml.safe_dump({"datasets": plain, **more}), encoding="utf-8")
    return ["--config", str(file)]


def test_a_run_sees_all_its_data_sets_as_often_as_they_say(
    common: list[str], photos: Path, parks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[loop.Batch] = []
    following = loop.next_batches

    def watching(run: loop.Run, step: int, micro: int) -> list[loop.Batch]:
        batches = following(run, step, micro)
        seen.extend(batches)
        return batches

    monkeypatch.setattr(loop, "next_batches", watching)
    sets = listed(
        tmp_path / "sets.yaml",
        {"instance_data_dir": photos, "instance_prompt": "a photo of sks dog"},
        {"instance_data_dir": parks, "instance_prompt": "a park", "repeats": 3, "resolution": 32, "loss_weight": 0.5,
         "mask_data_dir": parks.parent / "masks"},
    )  # fmt: skip
    run = train_with([*common, *sets])
    names = [name for batch in seen for name in batch.names]
    assert {name.split("/")[0] for name in names} == {photos.name, "parks"}
    sizes = {batch.latents.shape[-1]: {name.split("/")[0] for name in batch.names} for batch in seen}
    assert sizes == {8: {photos.name}, 16: {"parks"}}
    weigh = {name: weight for batch in seen for name, weight in zip(batch.names, batch.weights.tolist(), strict=True)}
    assert {name.split("/")[0]: round(weight, 4) for name, weight in weigh.items()} == {
        photos.name: 0.25,
        "parks": 0.125,
    }
    assert any(batch.masks is not None and batch.masks.mean() < 1 for batch in seen)
    assert "which are learned everywhere: 2 of 4" in run.summary_file.read_text(encoding="utf-8")
    saved = run.config()["datasets"]
    assert [entry.get("repeats") for entry in saved] == [None, 3] and saved[1]["mask_data_dir"]


def test_the_saved_config_makes_the_same_run(common: list[str], photos: Path, parks: Path, tmp_path: Path) -> None:
    entries = ({"instance_data_dir": photos}, {"instance_data_dir": parks, "repeats": 2})
    first = train_with([*common, *listed(tmp_path / "sets.yaml", *entries, instance_prompt="a dog")])
    again = ["--config", str(first.config_file), "--output_dir", str(tmp_path / "again")]
    assert same(weights(first), weights(train_with(again)))
    with_others = listed(tmp_path / "other.yaml", *entries[:1], {**entries[1], "repeats": 1}, instance_prompt="a dog")
    other = train_with([*common, *with_others, "--output_dir", str(tmp_path / "other")])
    assert not same(weights(first), weights(other))


def test_masks_decide_what_is_learned_and_what_is_measured(common: list[str], parks: Path, tmp_path: Path) -> None:
    flags = [*common, "--instance_data_dir", str(parks), "--instance_prompt", "a park", "--holdout", "1"]
    plain = train_with([*flags, "--output_dir", str(tmp_path / "plain")])
    for number in range(4):
        Image.new("L", (32, 32), 255).save(parks.parent / "masks" / f"{number}.png")
    masks = ["--mask_data_dir", str(parks.parent / "masks")]
    white = train_with([*flags, *masks, "--output_dir", str(tmp_path / "white")])
    for number in range(4):
        mask = Image.new("L", (32, 32))
        mask.paste(255, (0, 0, 16, 32))
        mask.save(parks.parent / "masks" / f"{number}.png")
    half = train_with([*flags, *masks, "--output_dir", str(tmp_path / "half")])
    assert all(torch.allclose(weights(plain)[name], value, atol=1e-5) for name, value in weights(white).items())
    assert not all(torch.allclose(weights(plain)[name], value, atol=1e-4) for name, value in weights(half).items())
    losses = [_first_loss(run) for run in (plain, white, half)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and abs(losses[2] / losses[0] - 1) > 1e-3


def _first_loss(run: RunFolder) -> float:
    return next(row["value"] for row in run.metrics() if row["name"] == "eval/loss")


def test_a_wrong_entry_is_told_before_anything_is_loaded(tmp_path: Path, photos: Path) -> None:
    file = listed(tmp_path / "sets.yaml", {"instance_data_dir": photos}, {"instance_data_dir": tmp_path / "nowhere"})
    with pytest.raises(UserError, match=r"there is no .*nowhere"):
        parse_run([*file, "--instance_prompt", "a dog"])


def test_a_resume_names_what_differs_in_which_data_set(
    common: list[str], photos: Path, parks: Path, tmp_path: Path
) -> None:
    file, moved = tmp_path / "sets.yaml", tmp_path / "elsewhere"
    first, second = {"instance_data_dir": photos}, {"instance_data_dir": parks, "repeats": 2}
    masked = {**second, "mask_data_dir": parks.parent / "masks"}

    def go_on(*entries: dict[str, Any]) -> RunFolder:
        on = ["--resume_from_checkpoint", "latest", "--max_train_steps", "7"]
        return train_with([*common, *listed(file, *entries, instance_prompt="a dog"), *on])

    train_with([*common, *listed(file, first, second, instance_prompt="a dog")])
    for entries, message in (
        ((first, {**second, "repeats": 3}), r"other settings: repeats of data set 2: 2 then, 3 now\. Give"),
        ((first, {**second, "loss_weight": 0.5}), r"other settings: loss_weight of data set 2: 1\.0 then, 0\.5 now\. "),
        ((first,), r"loss_weight of data set 2: 1\.0 then, 'none' now; repeats of data set 2: 2 then, 'none' now"),
        ((second, first), r"repeats of data set 1: 'none' then, 2 now; repeats of data set 2: 2 then, 'none' now"),
        ((first, masked), r"images or captions are others .*another mask: parks/"),
    ):
        with pytest.raises(UserError, match=message):
            go_on(*entries)
    parks.rename(moved)
    assert go_on(first, {**second, "instance_data_dir": moved}).checkpoint_steps()[-1] == 7
