"""`dreamlora evaluate` measures the loss that training measured, of any LoRA, on the same items."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dreamlora.commands.evaluate.command import main
from dreamlora.errors import UserError
from dreamlora.figures import change
from dreamlora.report.facts import RunFacts
from dreamlora.report.words import headline
from dreamlora.runfolder import RunFolder
from tests.commands.sample.test_draw import save_lora
from tests.training.conftest import cache, flags_of, photos, train_with
from tests.training.test_processes import REPOSITORY, train_with_two

__all__ = ["cache", "photos"]  # fixtures
QUICK = ["--max_train_steps", "4", "--sample_steps", "0", "--no_save_best", "--eval_steps", "2", "--lora_alpha", "6"]


def run_of(model: Path, output: Path, photos: Path, cache: Path, *more: str) -> RunFolder:
    return train_with([*flags_of(photos, cache, model, output), *QUICK, *more])


@pytest.fixture(scope="module")
def run(sd_folder: Path, photos: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that trained the text encoder as well; checkpoints at 2 and 4."""
    output = tmp_path_factory.mktemp("outputs") / "dog"
    return run_of(sd_folder, output, photos, cache, "--train_text_encoder", "--snr_gamma", "5")


def evaluate(output: Path, *argv: Any) -> dict[str, dict[str, Any]]:
    """Values by label and name."""
    flags = ["--metrics", "eval_loss", "--output_dir", output]
    main([str(word) for word in [*flags, "--trust_runs", "--lora", *argv]])
    rows = json.loads((output / "metrics.json").read_text(encoding="utf-8"))["rows"]
    return {row["label"]: {value["name"]: value for value in row["values"]} for row in rows}


def logged(run: RunFolder, name: str) -> dict[int, float]:
    return {row["step"]: row["value"] for row in run.metrics() if row["name"] == name}


def test_it_is_the_loss_that_training_logged(
    run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluate(tmp_path / "out", run.path, "--checkpoints")
    assert list(found) == ["base model", "dog, step 2", "dog, step 4"]
    for label, step in zip(found, (0, 2, 4), strict=True):
        for name in ("eval/loss", "eval/loss_rel"):
            assert found[label][name]["value"] == pytest.approx(logged(run, name).get(step, 1.0), rel=1e-5), label
        evalset = json.loads(run.evalset_file.read_text(encoding="utf-8"))
        assert found[label]["eval/loss"]["encoder_id"] == f"evalset {evalset['evalset_id']}"
        assert found[label]["eval/loss"]["n"] == evalset["items"]
    assert len({values["eval/loss"]["value"] for values in found.values()}) == 3
    assert not (tmp_path / "out" / "images").exists(), "nothing is drawn for it"
    table = capsys.readouterr().out
    last = change(logged(run, "eval/loss")[4], logged(run, "eval/loss")[0])
    for told in (table, headline(RunFacts(run))):
        assert f"({last})" in told, "the same words and numbers as the report of the run"
    assert "eval/loss ↓" in table and f"64 items, evalset {evalset['evalset_id']}" in table


def test_two_processes_equal_one(run: RunFolder, photos: Path, tmp_path: Path) -> None:
    """Of the loss and of images, with p-values and numbers; each process has its share alone, of 3 images and of 8."""
    asked = ["--num_images_per_prompt", "3", "--references", photos]
    asked += ["--metrics", "eval_loss", "clip_score", "dino", "kid", "diversity"]
    asked += [
        "--clip_model",
        "tiny",
        "--dino_model",
        "tiny",
        "--subject",
        "sks dog",
        "--trust_runs",
        "--lora",
        run.path,
    ]
    words = [
        [str(word) for word in [*asked, "--output_dir", place, "--latents_cache_dir", place / "cache"]]
        for place in (tmp_path / "one", tmp_path / "two")
    ]
    main(words[0])
    said = train_with_two(words[1], script=REPOSITORY / "train_scripts" / "evaluate.py")
    assert said.count("clip_t ↑") == 1, "one process speaks"
    results = [json.loads((tmp_path / place / "metrics.json").read_text(encoding="utf-8")) for place in ("one", "two")]
    assert results[0]["references"] == results[1]["references"] and results[0]["references"]["n"] == 8
    found = [result["rows"] for result in results]
    names = [value["name"] for value in found[0][1]["values"]]
    assert {"eval/loss", "img/clip_t", "img/dino", "img/kid", "img/kid_p", "img/div"} <= set(names)
    for one, two in zip(*found, strict=True):
        assert two["notes"] == one["notes"]
        for value, same in zip(one["values"], two["values"], strict=True):
            assert same == {**value, "value": pytest.approx(value["value"], rel=1e-4, abs=1e-6)}, value["name"]


@pytest.mark.parametrize(
    "more",
    [
        ["--mixed_precision", "bf16"],
        ["--mixed_precision", "bf16", "--train_text_encoder"],
        ["--prediction_type", "v_prediction", "--tokenizer_max_length", "5"],
        ["--base_precision", "int8", "--text_encoder_precision", "fp8", "--train_text_encoder"],
    ],
    ids=["bf16", "bf16 with a text encoder", "another prediction and short prompts", "fewer bits"],
)
def test_it_is_measured_as_the_run_computed(
    more: list[str], sd_folder: Path, photos: Path, cache: Path, tmp_path: Path
) -> None:
    run = run_of(sd_folder, tmp_path / "dog", photos, cache, *more, "--learning_rate", "0.1")
    found = evaluate(tmp_path / "out", run.path)
    for label, step in (("base model", 0), ("dog", 4)):
        assert found[label]["eval/loss"]["value"] == pytest.approx(logged(run, "eval/loss")[step], rel=1e-6), label


def test_flow_models_too(flux_folder: Path, photos: Path, cache: Path, tmp_path: Path) -> None:
    run = run_of(flux_folder, tmp_path / "flux", photos, cache, "--max_train_steps", "2", "--guidance_scale", "2")
    found = evaluate(tmp_path / "out", run.path)
    for label, step in (("base model", 0), ("flux", 2)):
        assert found[label]["eval/loss"]["value"] == pytest.approx(logged(run, "eval/loss")[step], rel=1e-5)


def test_a_lora_from_elsewhere_is_measured_on_the_items_of_a_run(
    run: RunFolder, sd_folder: Path, tmp_path: Path
) -> None:
    foreign = save_lora(sd_folder, tmp_path / "foreign", 3.0)
    model = ("--pretrained_model_name_or_path", sd_folder)
    found = evaluate(tmp_path / "out", foreign, "--evalset", run.final_evalset_file, *model)
    base, lora = (values["eval/loss"] for values in found.values())
    assert base["value"] == pytest.approx(logged(run, "eval/final_loss")[0], rel=1e-5) and base["n"] == 32
    assert lora["value"] != base["value"] and lora["encoder_id"] == base["encoder_id"]


def test_a_lora_of_enormous_values_has_no_loss(run: RunFolder, sd_folder: Path, tmp_path: Path) -> None:
    broken = save_lora(sd_folder, tmp_path / "broken", 1e30)
    model = ("--pretrained_model_name_or_path", sd_folder)
    found = evaluate(tmp_path / "out", broken, "--evalset", run.evalset_file, *model)
    assert [set(values) for values in found.values()] == [{"eval/loss", "eval/loss_rel"}, set()]
    assert "eval_loss is left out: the loss is not finite" in (tmp_path / "out" / "metrics.json").read_text(
        encoding="utf-8"
    )


def test_what_cannot_be_measured_is_told(run: RunFolder, sd_folder: Path, tmp_path: Path) -> None:
    foreign = save_lora(sd_folder, tmp_path / "foreign", 3.0)
    other = tmp_path / "other"
    shutil.copytree(sd_folder, other)
    config = json.loads((other / "unet" / "config.json").read_text(encoding="utf-8"))
    (other / "unet" / "config.json").write_text(json.dumps({**config, "flip_sin_to_cos": False}), encoding="utf-8")
    model = ("--pretrained_model_name_or_path", other)
    with pytest.raises(UserError, match="nothing could be measured"):
        evaluate(tmp_path / "none", foreign, *model)
    assert "eval_loss is left out: there is no evaluation set" in (tmp_path / "none" / "metrics.json").read_text(
        encoding="utf-8"
    )
    with pytest.raises(UserError, match=r"--evalset: .*evalset.json is for the model .*, not for .*other"):
        evaluate(tmp_path / "out", foreign, "--evalset", run.evalset_file, *model)
    with pytest.raises(UserError, match="nothing could be measured"):
        evaluate(tmp_path / "moved", run.path, *model)
    assert "is for the model" in (tmp_path / "moved" / "metrics.json").read_text(encoding="utf-8")
    (tmp_path / "picture").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "picture" / "a.png")
    with pytest.raises(UserError, match=r"only LoRAs have a loss, and .*picture holds images"):
        evaluate(tmp_path / "out", tmp_path / "picture")
    with pytest.raises(UserError, match=r"cannot read .*a.png: it is not UTF-8 text"):
        evaluate(tmp_path / "out", run.path, "--evalset", tmp_path / "picture" / "a.png")
    with pytest.raises(UserError, match=r"among the metrics: .* eval_loss is one too"):
        evaluate(tmp_path / "out", run.path, "--metrics", "evl")
    with pytest.raises(UserError, match="--evalset: there is no file gone"):
        evaluate(tmp_path / "out", run.path, "--evalset", "gone")
    with pytest.raises(UserError, match="only used together with eval_loss"):
        evaluate(tmp_path / "out", run.path, "--evalset", run.evalset_file, "--metrics", "kid")
