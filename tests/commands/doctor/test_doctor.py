"""``dreamlora doctor``: what it finds, on small models of every family, and on models and data that are wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file

from dreamlora import registry
from dreamlora.__main__ import main
from dreamlora.archives import open_tensors
from dreamlora.commands.doctor.words import lines_of
from dreamlora.figures import gibibytes
from dreamlora.lora.inject import trainable_parameters
from tests import real_sizes, tinymodels
from tests.tinymodels.flux import save as save_flux
from tests.tinymodels.sd import save as save_sd


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_sd(tmp_path_factory.mktemp("models") / "sd")


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model, tmp_path / "copy"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Four pictures, two of them alike, and captions of which one is long."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, (width, height) in enumerate([(32, 16), (32, 16), (16, 32), (24, 24)]):
        Image.new("RGB", (width, height), (number // 2 * 40, 90, 9)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a dog" if number else "a very long caption " * 4, encoding="utf-8")
    return folder


def told(capsys, *words: object) -> dict:
    """What it says as JSON."""
    AcceleratorState._reset_state(reset_partial_state=True)
    status = 0
    try:
        status = main(["doctor", *map(str, words), "--json"])
    except SystemExit as end:
        status = end.code
    found = json.loads(capsys.readouterr().out)
    assert status == (0 if found["would_run"] else 1)
    return found


def flags(photos: Path, tmp_path: Path) -> list[str]:
    where = ["--latents_cache_dir", str(tmp_path / "cache"), "--output_dir", str(tmp_path / "run")]
    return ["--instance_data_dir", str(photos), "--instance_prompt", "a photo of sks dog", "--resolution", "16", *where]


@pytest.mark.parametrize("family", registry.names("families"))
def test_every_family_is_gone_through_without_a_weight(family: str, tmp_path: Path, capsys) -> None:
    """The memory of each stage is found by the family's own code, or roughly where that goes by a tensor's numbers."""
    tiny = tinymodels.of(family)
    found = told(capsys, tiny.save(tmp_path / "model"), "--resolution", tiny.side, "--gradient_checkpointing")
    assert found["would_run"], found["errors"]
    assert found["family"] == family and found["recognised_by"].startswith("model_index.json names ")
    stages = {stage["stage"]: stage for stage in found["memory"]["stages"]}
    assert list(stages) == [
        *("encoding images", "encoding prompts", "training", "drawing samples", "check at the end"),
    ]
    rough = {name for name, stage in stages.items() if stage["rough"]}
    assert not rough & {"encoding prompts", "encoding images"}
    assert all(stage["work"] > 0 for stage in stages.values())


def test_parts_are_those_of_the_files(model: Path, capsys) -> None:
    found = told(capsys, model)
    unet = next(part for part in found["parts"] if part["name"] == "unet")
    weights = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")
    assert unet["parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert unet["bytes"] == (model / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert unet["precision"] == "F32" and unet["class"] == "UNet2DConditionModel"


def test_what_is_trained_is_what_a_training_trains(model: Path, photos: Path, tmp_path: Path, capsys, prepared) -> None:
    run = prepared(model, "--rank", "3", "--lora_alpha", "6", "--train_text_encoder")
    found = told(capsys, model, *flags(photos, tmp_path), "--rank", 3, "--lora_alpha", 6, "--train_text_encoder")
    trained = {each["part"]: each for each in found["trained"]}
    own = run.accelerator.unwrap_model(run.model)
    for name, module in (("unet", own.denoiser), ("text_encoder", own.encoders["text_encoder"])):
        assert trained[name]["parameters"] == sum(p.numel() for p in trainable_parameters(module).values())
        assert trained[name]["ranks"] == [3] and trained[name]["alphas"] == [6.0]


def test_a_moving_average_takes_memory_and_disk(model: Path, photos: Path, tmp_path: Path, capsys) -> None:
    """Two copies of the LoRA, one of them in every checkpoint."""
    given = [model, *flags(photos, tmp_path), "--max_train_steps", 2, "--checkpointing_steps", 1]
    plain, averaged = (told(capsys, *given, *more) for more in ([], ["--ema_decay", 0.9]))
    [trained] = plain["trained"]
    held = [
        {stage["stage"]: stage["held"] for stage in found["memory"]["stages"]}["training"]
        for found in (plain, averaged)
    ]
    assert held[1] - held[0] == 8 * trained["parameters"]
    assert averaged["disk"]["checkpoints"] - plain["disk"]["checkpoints"] == 2 * 4 * trained["parameters"]


@pytest.fixture
def prepared(photos: Path, tmp_path: Path):
    from dreamlora.cli.parse import parse_run
    from dreamlora.run import assemble

    def prepare(model: Path, *more: str):
        AcceleratorState._reset_state(reset_partial_state=True)
        nothing = [word for event in ("sample", "eval", "checkpointing") for word in (f"--{event}_steps", "0")]
        words = ["--pretrained_model_name_or_path", str(model), *flags(photos, tmp_path), *nothing, *more]
        return assemble.prepare(*parse_run(words))

    return prepare


def test_images_and_captions_are_counted(model: Path, photos: Path, tmp_path: Path, capsys) -> None:
    steps = ["--max_train_steps", "7", "--buckets", "--bucket_step", "8", "--holdout", "0"]
    found = told(capsys, model, *flags(photos, tmp_path), *steps)
    assert found["data"]["images"] == 4 and found["data"]["held_out"] == 0
    assert (found["data"]["smallest"], found["data"]["largest"]) == ([32, 16], [24, 24])
    assert sum(found["data"]["buckets"].values()) == 4 and len(found["data"]["buckets"]) == 3
    assert found["steps"] == 7 and "7, each of 4 images" in found["run"]["steps"]
    warned = " ".join(found["warnings"])
    assert "1 caption or prompt has more than 16 tokens" in warned and "0.png" in warned
    assert "1 of 4 images is a copy of another one" in warned


def test_disk_is_what_the_cache_then_takes(model: Path, photos: Path, tmp_path: Path, capsys, prepared) -> None:
    given = [*flags(photos, tmp_path), "--crop_variants", "2"]
    before = told(capsys, model, *given)["disk"]["latents"]
    prepared(model, "--crop_variants", "2")
    sizes = []
    for file in (tmp_path / "cache").rglob("*.safetensors"):
        with open_tensors(file) as tensors:
            if "mean" in tensors.keys():  # noqa: SIM118 - no mapping
                sizes.append(2 * 4 * tensors.get_tensor("mean").numel())
    after = told(capsys, model, *given)["disk"]["latents"]
    assert after == 0 and 0 < before <= sum(sizes)


def test_all_parts_that_cannot_be_loaded_are_named(copy: Path, capsys) -> None:
    (copy / "text_encoder" / "model.safetensors").unlink()
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    found = told(capsys, copy)
    assert len(found["errors"]) == 2
    assert "there are none. The folder is incomplete" in found["errors"][0]
    assert "only pickled weights" in found["errors"][1] and "--allow_pickle" in found["errors"][1]


def test_a_training_stops_at_a_part_that_is_missing_before_any_work(copy: Path, photos, tmp_path, capsys) -> None:
    (copy / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    words = ["dreambooth", "--pretrained_model_name_or_path", str(copy), *flags(photos, tmp_path)]
    assert main(words) == 2
    assert "unet" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists(), "nothing was encoded"


def test_a_training_stops_at_layers_that_are_not_there_before_any_work(model: Path, photos, tmp_path, capsys) -> None:
    words = ["dreambooth", "--pretrained_model_name_or_path", str(model), *flags(photos, tmp_path)]
    assert main([*words, "--lora_layers", "nowhere"]) == 2
    assert "'nowhere'" in capsys.readouterr().err
    assert not list((tmp_path / "cache").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--resolution", "18"], "--resolution must be a multiple of 8 (got 18)"),
        (["--lora_layers", "nowhere"], "'nowhere'"),
        (["--tokenizer_max_length", "1000"], "at most 16 tokens"),
    ],
)
def test_what_a_training_would_refuse_is_an_error(model, photos, tmp_path, capsys, more, said) -> None:
    found = told(capsys, model, *flags(photos, tmp_path), *more)
    assert not found["would_run"] and said in " ".join(found["errors"])


def test_a_vocabulary_in_sentencepiece_alone_needs_packages(tmp_path: Path, capsys, monkeypatch) -> None:
    model = save_flux(tmp_path / "flux")
    (model / "tokenizer_2" / "tokenizer.json").rename(model / "tokenizer_2" / "spiece.model")
    monkeypatch.setattr("dreamlora.models.inventory._is_installed", lambda module: module != "sentencepiece")
    found = told(capsys, model)
    [error] = found["errors"]
    assert "needs sentencepiece" in error and "dreamlora[t5]" in error


def test_a_distilled_model_is_told_of(tmp_path: Path, photos: Path, capsys) -> None:
    model = save_flux(tmp_path / "schnell", guidance_embeds=False)
    found = told(capsys, model)
    assert found["would_run"] and "--training_adapter" in " ".join(found["warnings"])
    words = ["dreambooth", "--pretrained_model_name_or_path", str(model), *flags(photos, tmp_path)]
    words += ["--max_train_steps", "1", "--sample_steps", "0", "--eval_steps", "0", "--no_parity_check"]
    assert main(words) == 0
    assert "was distilled to few steps" in capsys.readouterr().err


def test_bf16_weights_in_fp16_are_told_of(copy: Path, capsys) -> None:
    from types import SimpleNamespace

    from dreamlora.config import Model, RunConfig
    from dreamlora.models.inventory import inventory
    from dreamlora.models.loading import family_of, resolve_source
    from dreamlora.run import checks

    file = copy / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file)
    source = resolve_source(Model(pretrained_model_name_or_path=str(copy)))
    family = family_of(source)
    context = SimpleNamespace(
        config=RunConfig(),
        family=family,
        source=source,
        inventory=inventory(source, family),
        accelerator=SimpleNamespace(mixed_precision="fp16"),
    )
    [warning] = checks.warnings(context)
    assert "unet are bf16" in warning and "--mixed_precision bf16" in warning


def test_a_full_disk_is_told_before_anything_is_encoded(model, photos, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("dreamlora.run.checks.free_bytes", lambda folder: 100)
    found = told(capsys, model, *flags(photos, tmp_path))
    assert "--latents_cache_dir on another disk" in " ".join(found["errors"])


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """SD 1.5, as large as it is, without its numbers."""
    return real_sizes.save("sd15", tmp_path_factory.mktemp("models") / "sd15")


def test_what_vram_chooses_is_a_table(large: Path, capsys) -> None:
    """Half precision is chosen and told; flags that are given are not among those that are chosen."""
    found = told(capsys, large, "--train_batch_size", 24, "--resolution", 512)
    rows = {row["vram"]: row for row in found["vram"]}
    assert list(rows) == ["8", "10", "12", "16", "24"]
    assert [row["vram"] for row in found["vram"] if not row["fits"]] == ["8"]
    flags = "--mixed_precision bf16 --gradient_checkpointing"
    assert {rows[card]["flags"] for card in ("10", "12", "16", "24")} == {flags}
    assert all(row["needed"] < int(row["vram"]) * 2**30 / 1.1 for row in rows.values() if row["fits"])
    lines = [" ".join(line.split()) for line in lines_of(found)]
    assert f"10 {gibibytes(rows['10']['needed'])} training {flags}" in lines
    assert any(f"does not fit, not even with {flags} --base_precision int8" in line for line in lines)


PUBLISHED = [("sdxl", 1024, 2.6e9), ("flux", 512, 11.9e9), ("klein", 512, 3.9e9)]


@pytest.mark.parametrize(("name", "side", "numbers"), PUBLISHED)
def test_published_models_fit_on_the_gpus_that_people_own(name, side, numbers, tmp_path: Path, capsys) -> None:
    found = told(capsys, real_sizes.save(name, tmp_path / name), "--resolution", side, "--rank", 16)
    denoiser = next(part for part in found["parts"] if part["role"] == "denoiser")
    assert denoiser["parameters"] == pytest.approx(numbers, rel=0.02)
    assert all(row["fits"] for row in found["vram"]), found["vram"]
    needs_int8 = {row["vram"] for row in found["vram"] if "--base_precision int8" in row["flags"]}
    assert needs_int8 == {"sdxl": set(), "flux": {"8", "10", "12", "16", "24"}, "klein": {"8"}}[name]


def test_what_vram_has_chosen_is_what_the_stages_take(large: Path, capsys) -> None:
    found = told(capsys, large, "--vram", 4, "--resolution", 512)
    [row] = found["vram"]
    assert row["vram"] == "4" and row["flags"].startswith("--mixed_precision bf16 --gradient_checkpointing")
    assert row["needed"] == max(stage["needed"] for stage in found["memory"]["stages"]) < 3.1 * 2**30


def test_what_does_not_fit_would_not_run(large: Path, capsys) -> None:
    found = told(capsys, large, "--vram", 4, "--resolution", 4096)
    [error] = found["errors"]
    assert "--vram 4: this does not fit" in error and "a smaller --resolution (now 4096)" in error


def test_text_says_the_same(model: Path, photos: Path, tmp_path: Path, capsys) -> None:
    assert main(["doctor", str(model), *flags(photos, tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "family sd: model_index.json names StableDiffusionPipeline" in text
    assert text.splitlines()[-1] == "it would run"
    assert not (tmp_path / "run").exists()


def test_a_wrong_flag_is_no_finding(capsys) -> None:
    assert main(["doctor", "tiny", "--rnak", "3"]) == 2
    assert "--rank" in capsys.readouterr().err
