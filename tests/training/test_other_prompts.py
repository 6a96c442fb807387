"""Runs that go on with other prompts, seeds or settings show and measure what one does that always had them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dreamlora.data.folder import load_folder
from dreamlora.errors import UserError
from dreamlora.report.facts import RunFacts
from dreamlora.runfolder import RunFolder
from dreamlora.sampling.recorded import motif_of
from tests.training.conftest import flags_of, train_with

Train = Callable[..., RunFolder]
PROMPTS = {"ab": "a red dog\na green dog\n", "ca": "a cat\na red dog\n", "ba": "a green dog\na red dog\n"}
PROMPTS |= {"a": "a red dog\n", "abc": "a red dog\na green dog\na cat\n"}
MEASURE = ["--clip_model", "tiny", "--dino_model", "tiny", "--eval_metrics", "clip_score", "diversity", "drift"]
SPARSE = ["--final_eval_items", "0", "--eval_steps", "6", "--no_parity_check", *MEASURE]
ONE_LAYER = ["--lora_layers", "to_q"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    folder = tmp_path_factory.mktemp("prompts")
    for name, text in PROMPTS.items():
        (folder / name).write_text(text, encoding="utf-8")
    return lambda name: ["--sample_prompts", str(folder / name)]


@pytest.fixture(scope="module")
def half(
    photos: Path, cache: Path, sd_folder: Path, tmp_path_factory: pytest.TempPathFactory, prompts: Any
) -> RunFolder:
    """Four of six steps with prompts A and B; not to be written to."""
    folder = tmp_path_factory.mktemp("half") / "run"
    flags = flags_of(photos, cache, sd_folder, folder)
    return train_with([*flags, *SPARSE, *prompts("ab"), "--max_train_steps", "4"])


def samples(run: RunFolder) -> list[dict[str, Any]]:
    return run.sample_rows()


def pixels(run: RunFolder, row: dict[str, Any]) -> bytes:
    with Image.open(run.samples / row["file"]) as image:
        return image.tobytes()


def drawn(run: RunFolder) -> dict[tuple[int, Any], bytes]:
    return {(row["step"], motif_of(row)): pixels(run, row) for row in samples(run)}


def measured(run: RunFolder) -> dict[tuple[str, int, str], float]:
    rows = (row for row in run.metrics() if row["name"].startswith("img/"))
    return {(row["name"], row["step"], row["images_id"]): row["value"] for row in rows}


@pytest.mark.parametrize(
    "change",
    [
        ["ca"],
        ["ba"],
        ["a"],
        ["abc"],
        ["ab", "--sample_seed", "7"],
        ["ab", "--num_images_per_prompt", "2"],
        ["ab", "--negative_prompt", "blurry"],
        ["ab", "--sample_steps", "0", "--eval_metrics_steps", "3", "--eval_num_images", "2"],
    ],
    ids=" ".join,
)
def test_a_run_resumed_with_others_shows_and_measures_what_one_that_always_had_them_does(
    half: RunFolder, train: Train, tmp_path: Path, prompts: Any, change: list[str]
) -> None:
    flags = [*SPARSE, *prompts(change[0]), *change[1:]]
    resumed = RunFolder(shutil.copytree(half.path, tmp_path / "resumed"))
    before = drawn(resumed)
    train(*flags, "--resume_from_checkpoint", "latest", "--output_dir", str(resumed.path))
    always = train(*flags)
    now, wanted = drawn(resumed), drawn(always)
    assert {key: now.get(key) for key in wanted if key[0] in (0, 6)} == {
        key: value for key, value in wanted.items() if key[0] in (0, 6)
    }
    assert {key: now.get(key) for key in before} == before, "what was drawn of the old prompts stays"
    values, expected = measured(resumed), measured(always)
    for key in (key for key in expected if key[1] in (0, 6)):
        assert values[key] == expected[key], key
    assert measured(half).items() <= values.items(), "what was measured of the old images stays"
    (mine,) = {key[2] for key in expected}
    assert RunFacts(resumed).curve("img/clip_t_change").values[-1] == values["img/clip_t_change", 6, mine]


def test_the_last_picture_that_is_checked_is_one_of_the_new_prompts(
    half: RunFolder, train: Train, tmp_path: Path, prompts: Any
) -> None:
    """Resumed at the very last step, which has pictures of both sets; the old prompts are not even encoded."""
    resumed = RunFolder(shutil.copytree(half.path, tmp_path / "resumed"))
    more = ["--max_train_steps", "4", "--parity_check", "--resume_from_checkpoint", "latest"]
    train(*SPARSE, *prompts("ca"), *more, "--output_dir", str(resumed.path))
    last = [row["prompt"] for row in samples(resumed) if row["step"] == 4]
    assert last == ["a cat", "a red dog", "a red dog", "a green dog"]
    assert "psnr_db" in json.loads(resumed.summary_file.read_text(encoding="utf-8"))["parity"]


def test_a_run_that_takes_over_anothers_folder_shows_no_old_picture_as_new(
    half: RunFolder, train: Train, tmp_path: Path, prompts: Any
) -> None:
    adopted = train(*SPARSE, *prompts("ca"), "--resume_from_checkpoint", str(half.checkpoint_dir(2)))
    titles = {row["prompt"] for row in samples(adopted) if row["step"] == 6}
    assert titles == {"a cat", "a red dog"}
    assert [row["prompt"] for row in samples(adopted) if row["step"] == 0] == [
        *("a cat", "a red dog", "a red dog", "a green dog")
    ]


@pytest.mark.parametrize("start", ["gaussian", "pissa"])
@pytest.mark.parametrize("encoder", ["--no_train_text_encoder", "--train_text_encoder"])
def test_the_base_model_is_drawn_anew_to_the_last_bit(
    train: Train, tmp_path: Path, prompts: Any, start: str, encoder: str
) -> None:
    how = ["--init", start, encoder, *SPARSE, "--eval_metrics", "--sample_steps", "2", "--max_train_steps", "2"]
    one = train(*how, *prompts("a"), "--output_dir", str(tmp_path / "one"))
    other = train(*how, *prompts("ba"), "--output_dir", str(tmp_path / "other"))
    train(*how, *prompts("ba"), "--output_dir", str(one.path), "--resume_from_checkpoint", "latest")
    again, wanted = drawn(one), drawn(other)
    assert wanted.items() <= again.items()


def test_values_by_another_encoder_are_apart(
    half: RunFolder, train: Train, tmp_path: Path, prompts: Any, tiny_clip_copy: Path
) -> None:
    resumed = RunFolder(shutil.copytree(half.path, tmp_path / "resumed"))
    flags = [*SPARSE, *prompts("ab"), "--clip_model", str(tiny_clip_copy), "--resume_from_checkpoint", "latest"]
    train(*flags, "--output_dir", str(resumed.path))
    rows = [row for row in resumed.metrics() if row["name"] == "img/clip_t"]
    first, second = rows[0]["encoder_id"], rows[-1]["encoder_id"]
    assert first != second
    steps = [(0, first), (3, first), (4, first), (0, second), (6, second)]
    assert [(row["step"], row["encoder_id"]) for row in rows] == steps
    told = json.loads(resumed.summary_file.read_text(encoding="utf-8"))["warnings"]
    assert any("up to step 4 are of other images" in text for text in told)
    (curve,) = [one for one in RunFacts(resumed).image_metrics if one.name == "img/clip_t"]
    assert curve.curve.steps == (0, 6) and [earlier.steps for earlier in curve.earlier] == [(0, 3, 4)]
    assert "Grey: values until step 4" in resumed.report_html.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tiny_clip_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded CLIP as another one: its id is of its files."""
    from dreamlora import tiny

    copy = shutil.copytree(tiny.PRESETS / "weights" / "clip", tmp_path_factory.mktemp("clip") / "copy")
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    (copy / "config.json").write_text(json.dumps({**config, "note": "another"}), encoding="utf-8")
    return copy


def test_a_loss_on_other_items_is_no_continuation(
    half: RunFolder, photos: Path, train: Train, tmp_path: Path, prompts: Any
) -> None:
    """A photo that was held out is replaced: base model, curve and best checkpoint are of the new items."""
    own = shutil.copytree(photos, tmp_path / "photos")
    flags = [*SPARSE, *prompts("ab"), "--instance_data_dir", str(own), "--eval_steps", "2"]
    run = train(*flags, "--max_train_steps", "4")
    key = json.loads(run.evalset_file.read_text(encoding="utf-8"))["noise_keys"][0]
    (held_out,) = [record for record in load_folder(own, "a").records if record.content_hash() in key]
    Image.new("RGB", (24, 20), "red").save(held_out.where)
    try:
        train(*flags, "--resume_from_checkpoint", "latest")
    except UserError as error:  # another split of the photos is refused, which is as good
        pytest.skip(str(error))
    facts = RunFacts(run)
    assert facts.curve("eval/loss").steps == (0, 4, 6)
    assert facts.evaluation is not None and facts.evaluation.base is not None
    assert any("up to step 4 was measured on other items" in text for text in facts.warnings)
    assert json.loads(run.summary_file.read_text(encoding="utf-8"))["eval"]["base"] == facts.evaluation.base
