"""Complete runs with metrics of drawn images."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path

import pytest
import torch
from PIL import Image

from dreamlora.errors import UserError
from dreamlora.evaluation.encoders import load_encoder
from dreamlora.jsonl import read_jsonl
from dreamlora.runfolder import RunFolder
from dreamlora.schemas import SAMPLE_ROW
from tests.training.conftest import flags_of, train_with
from tests.training.test_resume import assert_equal_runs
from tests.training.test_run import same, weights

Train = Callable[..., RunFolder]
TINY = ["--clip_model", "tiny", "--dino_model", "tiny"]
MEASURE = [*TINY, "--eval_metrics", "clip_score", "dino", "drift", "--validation_prompt", "a small dog"]
SPARSE = ["--final_eval_items", "0", "--eval_steps", "6"]


@pytest.fixture(scope="module")
def measured(photos: Path, cache: Path, sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run with image metrics of its samples; not to be written to."""
    folder = tmp_path_factory.mktemp("measured") / "run"
    return train_with([*flags_of(photos, cache, sd_folder, folder), *MEASURE, *SPARSE])


def image_rows(run: RunFolder) -> list[dict]:
    return [row for row in run.metrics() if row["name"].startswith("img/")]


def test_the_clip_score_is_the_mean_cosine_of_samples_and_prompts(measured: RunFolder) -> None:
    """Of the files, by hand; the rare token is not part of what is scored."""
    encoder = load_encoder("tiny", torch.device("cpu"))
    texts = encoder.texts(["a photo of dog", "a small dog"])
    rows = {row["step"]: row for row in image_rows(measured) if row["name"] == "img/clip_t"}
    assert list(rows) == [0, 3, 6]
    scores = {}
    for step, row in rows.items():
        files = sorted(measured.sample_dir(step).glob("*.png"))
        assert [file.name[:8] for file in files] == ["p00_s42-", "p01_s43-"]
        images = encoder.images([Image.open(file).convert("RGB") for file in files])
        scores[step] = torch.cosine_similarity(images.double(), texts.double())
        assert row["value"] == pytest.approx(float(scores[step].mean()), abs=1e-5)
        assert (row["n"], row["encoder_id"]) == (2, encoder.id)
    change = {row["step"]: row for row in image_rows(measured) if row["name"] == "img/clip_t_change"}
    assert list(change) == [3, 6]
    apart = scores[6] - scores[0]
    assert change[6]["value"] == pytest.approx(float(apart.mean()), abs=1e-5)
    assert change[6]["se"] == pytest.approx(float(apart.std() / 2**0.5), abs=1e-5)


def test_other_metrics_have_their_images(measured: RunFolder) -> None:
    rows = {(row["name"], row["step"]): row for row in image_rows(measured)}
    assert rows["img/drift", 0]["value"] == pytest.approx(0, abs=1e-6), "of the base model against itself"
    assert rows["img/drift", 6]["value"] > 0 and rows["img/drift", 6]["n"] == 1
    assert (rows["img/dino", 6]["n"], rows["img/dino", 6]["n_other"]) == (1, 1), (
        "one sample of the subject, one held out"
    )
    product = measured.selection()["best_product"]
    expected = {step: rows["img/dino", step]["value"] * rows["img/clip_t", step]["value"] for step in (3, 6)}
    assert product["product"] == pytest.approx(max(expected.values()))
    assert product["step"] == max(expected, key=lambda step: expected[step])


def test_the_report_shows_them_with_encoder_and_number(measured: RunFolder) -> None:
    html = measured.report_html.read_text(encoding="utf-8")
    assert 'aria-label="clip_t by step' in html and "CLIP-T: does the image show its prompt?" in html
    (encoder,) = {row["encoder_id"] for row in image_rows(measured) if "encoder_id" in row}
    written = unescape(measured.report_md.read_text(encoding="utf-8")).replace("\\", "")
    for page in (html, written):
        assert encoder in page and "1 and 1" in page


def test_measuring_images_does_not_change_the_training(measured: RunFolder, train: Train) -> None:
    assert same(weights(measured), weights(train("--sample_steps", "0", *SPARSE)))


def test_a_resumed_run_measures_what_the_uninterrupted_one_measures(measured: RunFolder, train: Train) -> None:
    resumed = train(*MEASURE, *SPARSE, "--resume_from_checkpoint", str(measured.checkpoint_dir(4)))
    assert_equal_runs(measured, resumed)
    assert [row["step"] for row in image_rows(resumed)] == [row["step"] for row in image_rows(measured)]


def test_an_encoder_that_cannot_be_loaded_is_said_once_and_fails_nothing(train: Train) -> None:
    run = train("--eval_metrics", "clip_score", "--clip_model", "/no/such/folder", *SPARSE)
    (told,) = [
        text for text in json.loads(run.summary_file.read_text(encoding="utf-8"))["warnings"] if "clip_score" in text
    ]
    assert told.startswith("clip_score is left out: ") and "no such folder: /no/such/folder" in told
    assert not image_rows(run) and told in re.sub("<[^>]*>", "", run.report_html.read_text(encoding="utf-8"))


def test_images_to_compare_with_that_vanish_fail_nothing(
    train: Train, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dreamlora.evaluation import embed

    def gone(*_: object) -> None:
        raise UserError("cannot read the image held_out.png")

    monkeypatch.setattr(embed.Embedder, "images", gone)
    run = train(*TINY, "--eval_metrics", "dino", "--max_train_steps", "1", *SPARSE)
    (told,) = [
        text for text in json.loads(run.summary_file.read_text(encoding="utf-8"))["warnings"] if "image metrics" in text
    ]
    assert told == "no image metrics: cannot read the image held_out.png"
    assert run.checkpoint_steps() == [1]


def test_images_for_the_metrics_alone(train: Train, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a {} in the snow\n# a comment\na cat\n", encoding="utf-8")
    own = ["--eval_prompts", str(tmp_path / "prompts.txt"), "--eval_num_images", "2", "--eval_metrics_steps", "4"]
    run = train(*TINY, "--eval_metrics", "clip_score", "diversity", *own, *SPARSE, "--sample_steps", "0")
    assert not run.samples.exists() and not run.grid_file.exists()
    drawn = list(read_jsonl(run.eval_images_file, SAMPLE_ROW))
    assert [row["step"] for row in drawn] == [0] * 4 + [4] * 4 + [6] * 4
    assert {row["prompt"] for row in drawn} == {"a sks dog in the snow", "a cat"}
    assert {row["seed"] for row in drawn} == {1234, 1235, 1236, 1237}
    assert {(row["name"], row["step"]): row["n"] for row in image_rows(run)} == {
        **{("img/clip_t", step): 4 for step in (0, 4, 6)},
        **{("img/div", step): 4 for step in (0, 4, 6)},
        **{("img/clip_t_change", step): 4 for step in (4, 6)},
    }


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        (["--eval_metrics", "clip_scor"], "--eval_metrics: unknown name 'clip_scor'.*Did you mean 'clip_score'"),
        (["--eval_num_images", "2"], "--eval_num_images is only used together with --eval_metrics"),
        (["--eval_metrics", "kid", "--sample_steps", "0"], "with --sample_steps 0 there are no images to measure"),
        (["--eval_metrics", "kid", "--eval_prompts", "gone.txt"], "--eval_prompts: there is no gone.txt"),
    ],
)
def test_mistakes_are_found_at_once(mistake: list[str], told: str, train: Train) -> None:
    with pytest.raises(UserError, match=told):
        train(*mistake)
