"""``dreamlora evaluate`` on a small pipeline, in the eyes of the embedded CLIP."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dreamlora.commands.evaluate import drawing
from dreamlora.commands.evaluate.command import main
from dreamlora.errors import UserError
from dreamlora.evaluation import embedders
from dreamlora.runfolder import RunFolder
from dreamlora.tiny.subjects import write_instance_images
from tests.commands.sample.test_draw import save_lora


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures of a subject, of which two are held out."""
    folder = tmp_path_factory.mktemp("photos")
    write_instance_images(folder, "checkerling", 12)
    return folder


@pytest.fixture(scope="module")
def run(sd_folder: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run folder."""
    folder = RunFolder(tmp_path_factory.mktemp("outputs") / "creature-adamw")
    folder.path.mkdir()
    folder.config_file.write_text(
        f"pretrained_model_name_or_path: {sd_folder}\ninstance_prompt: a photo of sks creature\n"
        f"class_prompt: a creature\ninstance_data_dir: {photos}\nresolution: 16\nnum_inference_steps: 2\n",
        encoding="utf-8",
    )
    save_lora(sd_folder, folder.path, 5.0)
    return folder


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images every call of the pipeline drew."""
    counts: list[int] = []
    original = drawing.draw_batch

    def counting(pipeline: Any, plan: Any, items: Any, embed: Any) -> Any:
        counts.append(len(items))
        return original(pipeline, plan, items, embed)

    monkeypatch.setattr(drawing, "draw_batch", counting)
    return counts


def evaluate(output: Path, *argv: Any) -> dict[str, Any]:
    flags = ["--output_dir", output, "--latents_cache_dir", output.parent / "cache", "--clip_model", "tiny"]
    main([str(word) for word in [*argv, "--trust_runs", *flags, "--dino_model", "tiny"]])
    result: dict[str, Any] = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
    return result


def values(result: dict[str, Any], row: int) -> dict[str, Any]:
    return {value["name"]: value for value in result["rows"][row]["values"]}


def test_a_run_is_measured_against_its_base_model_and_its_own_images(
    run: RunFolder, tmp_path: Path, drawn: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate(tmp_path / "out", run.path, "--num_images_per_prompt", 2)
    assert [row["label"] for row in result["rows"]] == ["base model", "creature-adamw"]
    base, lora = values(result, 0), values(result, 1)
    assert set(lora) == {
        *("img/clip_t", "img/clip_i", "img/dino", "img/div", "img/copy", "img/drift"),
        *("img/kid", "img/kid_p", "img/kid_negative", "img/cmmd", "img/cmmd_p", "img/cmmd_negative"),
    }
    assert base["img/drift"]["value"] == pytest.approx(0, abs=1e-6) and lora["img/drift"]["value"] > 1e-3
    counts = {name: (value["n"], value["n_other"]) for name, value in lora.items()}
    assert counts["img/clip_t"] == (4, None) and counts["img/dino"] == (2, 2) and counts["img/copy"] == (2, 10)
    assert counts["img/drift"] == (2, 2), "the class prompt is without the subject"
    assert all(value["encoder_id"].startswith("tiny@") for value in lora.values())
    assert (result["references"]["n"], result["training"]["n"]) == (2, 10)
    assert sum(drawn) == 8 and len(list((tmp_path / "out" / "images").rglob("*.png"))) == 8
    shown = capsys.readouterr().out
    assert "clip_t ↑" in shown and shown.splitlines()[-1] == str(tmp_path / "out" / "metrics.json")


def test_images_that_are_there_are_not_drawn_again(run: RunFolder, tmp_path: Path, drawn: list[int]) -> None:
    first = evaluate(tmp_path / "out", run.path, "--num_images_per_prompt", 1)
    assert sum(drawn) == 4
    assert evaluate(tmp_path / "out", run.path, "--num_images_per_prompt", 1)["rows"] == first["rows"]
    assert sum(drawn) == 4
    next((tmp_path / "out" / "images" / "base-model").glob("p01*")).unlink()
    assert evaluate(tmp_path / "out", run.path, "--num_images_per_prompt", 1)["rows"] == first["rows"]
    assert sum(drawn) == 5
    other = evaluate(tmp_path / "out", run.path, "--num_images_per_prompt", 1, "--lora_scales", 0.5)
    assert sum(drawn) == 7, "the base model's images are those from before"
    assert values(other, 1)["img/clip_t"]["value"] != values(first, 1)["img/clip_t"]["value"]


@pytest.mark.parametrize("flag", [None, "--references", "--training_images"])
def test_broken_images_of_a_folder_are_told_before_anything_is_loaded(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str | None
) -> None:
    folder = tmp_path / "images"
    shutil.copytree(photos, folder)
    files = sorted(folder.glob("*.png"))
    for file in files[:2]:
        file.write_bytes(file.read_bytes()[:300])
    monkeypatch.setattr(embedders, "load_encoder", lambda *_: pytest.fail("an encoder was loaded"))
    argv = [folder] if flag is None else [photos, flag, folder]
    with pytest.raises(UserError, match=rf"(?s)^2 of 12 images cannot be read.*{files[0].name}.*{files[1].name}"):
        evaluate(tmp_path / "out", *argv, "--metrics", "dino")


def test_a_folder_of_images_is_measured_with_its_captions(photos: Path, tmp_path: Path, drawn: list[int]) -> None:
    images = tmp_path / "images"
    shutil.copytree(photos, images)
    result = evaluate(tmp_path / "out", images, "--metrics", "clip_score", "dino", "kid", "fid", "--references", photos)
    row = result["rows"][0]
    assert row["label"] == str(images) and not drawn
    assert {value["name"]: value["n"] for value in row["values"]} == {
        "img/dino": 12,
        "img/kid": 12,
        "img/kid_p": 12,
        "img/kid_negative": 12,
        "img/fd": 12,
    }
    assert values(result, 0)["img/kid_negative"]["value"] == 1, "they are the references themselves"
    assert row["notes"][0].startswith("clip_score is left out: the images' prompts are not known")
    for image in images.glob("*.png"):
        image.with_suffix(".txt").write_text("a photo of sks creature", encoding="utf-8")
    captioned = evaluate(tmp_path / "out", images, "--metrics", "clip_score")
    prompted = evaluate(tmp_path / "out", photos, "--metrics", "clip-score", "--prompts", "a photo of sks creature")
    assert captioned["rows"][0]["values"] == prompted["rows"][0]["values"]
    named = evaluate(tmp_path / "out", images, "--metrics", "clip_score", "--subject", "sks creature")
    assert named["rows"][0]["values"] != captioned["rows"][0]["values"], "the rare token is not scored"


@pytest.mark.usefixtures("glow")
def test_a_metric_that_was_put_into_the_folder_is_measured(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate(tmp_path / "out", photos, "--metrics", "Glow", "--references", photos)
    assert set(values(result, 0)) == {"img/glow", "img/glow_spread"}
    shown = capsys.readouterr().out
    assert "glow ↓" in shown and "0.0000 (spread " in shown and "glow: 12 against 12 images, tiny@" in shown


def test_a_run_whose_images_have_gone_says_so(run: RunFolder, tmp_path: Path) -> None:
    moved = RunFolder(tmp_path / "moved")
    shutil.copytree(run.path, moved.path)
    text = moved.config_file.read_text(encoding="utf-8")
    moved.config_file.write_text(text.replace("instance_data_dir: ", "instance_data_dir: /gone"), encoding="utf-8")
    asked = ("--metrics", "dino", "clip_score", "--num_images_per_prompt", 1)
    result = evaluate(tmp_path / "out", moved.path, *asked)
    notes = "\n".join(result["rows"][1]["notes"])
    assert (
        set(values(result, 1)) == {"img/clip_t"}
        and "dino is left out: there are no reference images (--references" in notes
    )
    assert "cannot be used: --instance_data_dir /gone" in notes


def test_an_image_that_is_not_finite_is_left_out(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = drawing.draw_batch

    def broken(pipeline: Any, plan: Any, items: Any, embed: Any) -> Any:
        found = original(pipeline, plan, items, embed)
        return [type(one)(one.item, one.image, "not finite") if one.item.seed == 42 else one for one in found]

    monkeypatch.setattr(drawing, "draw_batch", broken)
    result = evaluate(tmp_path / "out", run.path, "--metrics", "clip_score", "--num_images_per_prompt", 1)
    assert [row["values"][0]["n"] for row in result["rows"]] == [1, 1]
    assert list(result["problems"].values()) == [{"p00_s42": "not finite"}] * 2
    assert "images that came out not finite do not count: p00_s42" in result["rows"][1]["notes"]


def test_nothing_that_could_be_measured_is_a_mistake(photos: Path, tmp_path: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(photos, images)
    with pytest.raises(UserError, match="nothing could be measured: the notes above"):
        evaluate(tmp_path / "out", images, "--metrics", "clip_score", "kid")
    assert (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["nothing"], "--lora: there is no nothing"),
        (["."], r"\.: expected pytorch_lora_weights.safetensors"),
        ([".", "--metrics", "fjd"], r"--metrics: unknown name 'fjd'.*Did you mean 'fid'\?"),
        ([".", "--references", "gone"], "--references: there is no folder gone"),
        ([".", "--num_images_per_prompt", "0"], "--num_images_per_prompt must be at least 1"),
    ],
    ids=["no path", "no lora", "no metric", "no references", "no images"],
)
def test_mistakes_are_told(argv: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=told):
        main(argv)


def test_several_prompts_for_a_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / "a.png")
    with pytest.raises(UserError, match="can all have one prompt, or captions beside them"):
        evaluate(tmp_path / "out", tmp_path / "images", "--prompts", "a", "b")


def test_images_of_another_prediction_are_other_images(run: RunFolder, tmp_path: Path, drawn: list[int]) -> None:
    moved = RunFolder(Path(shutil.copytree(run.path, tmp_path / "creature")))
    asked = ("--metrics", "clip_score", "--num_images_per_prompt", 1)
    evaluate(tmp_path / "out", moved.path, *asked)
    moved.config_file.write_text(moved.config_file.read_text(encoding="utf-8") + "prediction_type: v_prediction\n")
    result = evaluate(tmp_path / "out", moved.path, *asked)
    assert sum(drawn) == 8, "those that are there are of epsilon"
    assert result["base_model"].endswith(" with v_prediction") and result["precision"] == "float32"
    result = evaluate(tmp_path / "out", moved.path, *asked, "--base_precision", "int8")
    assert sum(drawn) == 12 and result["base_model"].endswith(" with v_prediction, weights in int8")


def test_what_runs_do_not_share_is_told_with_their_values(run: RunFolder, tmp_path: Path) -> None:
    other = RunFolder(Path(shutil.copytree(run.path, tmp_path / "other")))
    other.config_file.write_text(other.config_file.read_text(encoding="utf-8") + "mixed_precision: bf16\n")
    asked = ("--metrics", "clip_score", "--num_images_per_prompt", 1)
    rows = evaluate(tmp_path / "out", run.path, other.path, *asked)["rows"]
    note = "other was trained with --mixed_precision bf16, and is treated here as creature-adamw was, without"
    assert [any(note in told for told in row["notes"]) for row in rows] == [False, False, True]
