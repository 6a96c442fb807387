"""``dreamlora export``: every format of a LoRA draws the images that the LoRA draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dreamlora.__main__ import dispatch
from dreamlora.errors import UserError
from dreamlora.jsonl import read_jsonl
from dreamlora.lora import embeddings
from dreamlora.lora.formats import diffusers
from dreamlora.lora.saving import save_content
from dreamlora.lora.weights import AdapterWeights, LayerWeights, lora_weights
from dreamlora.schemas import OBJECT

FORMATS = ("kohya", "comfyui", "diffusers", "peft")
PARTS = {
    "sd": ("unet", "text_encoder"),
    "sdxl": ("unet", "text_encoder", "text_encoder_2"),
    "z_image": ("transformer",),
}
LAYERS = ("to_q", "to_v", "to_out.0", "q_proj", "fc1", "conv1", "proj_in")


def weights_for(pipeline: Any, components: tuple[str, ...]) -> AdapterWeights:
    """Of ranks and alphas that differ."""
    draw, weights = torch.Generator().manual_seed(0), {}
    for component in components:
        for name, layer in getattr(pipeline, component).named_modules():
            if name.endswith(LAYERS):
                rank = 1 + len(weights) % 3
                rows, *columns = layer.weight.shape
                down = torch.randn(rank, *columns, generator=draw) * 0.4
                up = torch.randn(rows, rank, *(1 for _ in columns[1:]), generator=draw) * 0.4
                weights[component, name.removeprefix("text_model.")] = lora_weights(down, up, 1.5)
    return {
        component: {layer: each for (part, layer), each in weights.items() if part == component}
        for component in components
    }


@pytest.fixture(scope="module", params=PARTS)
def case(request, tiny_folder, tmp_path_factory) -> tuple[str, Path, Path]:
    """Family, model, and a run with a LoRA."""
    family: str = request.param
    model = tiny_folder(family)
    run = tmp_path_factory.mktemp("outputs") / f"cat-{family}"
    pipeline = DiffusionPipeline.from_pretrained(model)
    content = diffusers.write(weights_for(pipeline, PARTS[family]))
    save_content(run / "pytorch_lora_weights.safetensors", content._replace(metadata={**content.metadata, **OWN}))
    options = f"pretrained_model_name_or_path: {model}\ninstance_prompt: a photo of sks cat\n"
    (run / "config.yaml").write_text(options, encoding="utf-8")
    return family, model, run


OWN = {"own": "kept", "modelspec.implementation": "diffusers"}
"""What the run's file says of itself."""


def export(*argv: Any) -> None:
    dispatch(["export", *map(str, argv)])


def images(output: Path, model: Path, *loras: Path) -> list[np.ndarray]:
    """Two of each row."""
    flags = ["--output_dir", output, "--num_inference_steps", 2, "--resolution", 32, "--prompts", "a cat", "a dog"]
    dispatch(["sample", *map(str, [*loras, "--pretrained_model_name_or_path", model, *flags])])
    files = [row["file"] for row in read_jsonl(output / "samples.jsonl", OBJECT)]
    pictures = [np.asarray(Image.open(output / file), dtype=np.int16) for file in files]
    return [np.stack(pictures[place : place + 2]) for place in range(0, len(pictures), 2)]


def test_every_format_draws_the_same_images(case, tmp_path: Path, capsys) -> None:
    """To rounding: some have the scale in the factors."""
    _, model, run = case
    files = {form: tmp_path / (form if form == "peft" else f"{form}.safetensors") for form in FORMATS}
    for form, file in files.items():
        export(run, "--format", form, "--output", file, "--trust_runs")
        assert capsys.readouterr().out.strip() == str(file)
    base, own, *others = images(tmp_path / "grid", model, run, *files.values())
    assert np.abs(base - own).max() > 16
    assert [np.abs(other - own).max() <= 1 for other in others] == [True] * len(files)


def test_what_was_exported_can_be_exported_again(case, tmp_path: Path) -> None:
    """Through all formats and back, in any precision that holds it."""
    family, _, run = case
    before, last = run, run
    for form in ("kohya", "peft", "comfyui", "diffusers"):
        last = tmp_path / (form if form == "peft" else f"{form}.safetensors")
        export(before, "--format", form, "--output", last, "--family", family)
        before = last
    first = diffusers.read(content_of(run / "pytorch_lora_weights.safetensors"))
    again = diffusers.read(content_of(last))
    assert first.keys() == again.keys()
    for component, adapters in first.items():
        assert adapters.keys() == again[component].keys()
        for layer, adapter in adapters.items():
            torch.testing.assert_close(again[component][layer].delta(), adapter.delta())


def content_of(file: Path) -> Any:
    with safe_open(file, "pt") as opened:
        return diffusers.FileContent(load_file(file), opened.metadata())


def test_the_header_says_where_it_is_from(case, tmp_path: Path) -> None:
    family, _, run = case
    file = tmp_path / "kohya.safetensors"
    export(run, "--format", "kohya", "--output", file, "--trust_runs", "--dtype", "bf16")
    content = content_of(file)
    assert content.metadata["own"] == "kept"
    code = {"sd": "diffusers", "sdxl": "https://github.com/Stability-AI/generative-models"}  # kohya's SD has its names
    assert content.metadata["modelspec.implementation"] == code.get(family, "https://github.com/Tongyi-MAI/Z-Image")
    told = json.loads(content.metadata["dreamlora.exported"])
    assert (told["from"], told["to"]) == ("diffusers", "kohya")
    assert "lora_adapter_metadata" not in content.metadata
    assert {tensor.dtype for name, tensor in content.tensors.items() if "alpha" not in name} == {torch.bfloat16}


def lora(file: Path, weights: LayerWeights) -> Path:
    return save_content(file, diffusers.write({"unet": {"mid_block.attentions.0.proj_in": weights}}))


@pytest.mark.parametrize("command", [["export", "--format", "kohya"], ["resize", "--rank", "1"]])
def test_embeddings_of_new_tokens_stay_where_they_are_and_that_is_told(command, tmp_path: Path, caplog) -> None:
    file = lora(tmp_path / "cat.safetensors", lora_weights(torch.ones(1, 4), torch.ones(4, 1)))
    arguments = [command[0], str(file), *command[1:], "--family", "sd", "--output"]
    dispatch([*arguments, str(tmp_path / "plain.safetensors")])
    assert "embeddings" not in caplog.text
    [beside] = embeddings.write(tmp_path, {"sks": {"text_encoder": torch.ones(1, 4)}}, {"text_encoder": "emb_params"})
    dispatch([*arguments, str(tmp_path / "told.safetensors")])
    assert f"needs the embeddings of its new tokens too, which stay where they are: {beside}" in caplog.text


@pytest.mark.parametrize("form", ["diffusers", "kohya", "comfyui"])
def test_a_precision_that_cannot_hold_it_is_refused_by_name(form: str, tmp_path: Path) -> None:
    file = lora(tmp_path / "cat.safetensors", lora_weights(torch.ones(1, 4), torch.full((4, 1), 7e4)))
    output = tmp_path / "out.safetensors"
    arguments = (file, "--format", form, "--output", output, "--family", "sd")
    with pytest.raises(UserError, match=r"(mid_block|middle_block).*proj_in.* 70000.* 65504.*bf16"):
        export(*arguments, "--dtype", "fp16")
    assert not output.exists()
    export(*arguments, "--dtype", "bf16")
    assert output.exists()


def test_numbers_that_vanish_are_told(tmp_path: Path, caplog) -> None:
    file = lora(tmp_path / "cat.safetensors", lora_weights(torch.ones(1, 4), torch.full((4, 1), 1e-9)))
    export(file, "--format", "diffusers", "--output", tmp_path / "out.safetensors", "--dtype", "fp16")
    assert "float16 has no numbers as small as some in unet.mid_block.attentions.0.proj_in.lora_B.weight" in caplog.text


def test_what_is_there_is_not_replaced_unless_told_to(tmp_path: Path) -> None:
    file = lora(tmp_path / "cat.safetensors", lora_weights(torch.ones(1, 4), torch.ones(4, 1)))
    output = tmp_path / "out.safetensors"
    output.write_text("something", encoding="utf-8")
    arguments = (file, "--format", "diffusers", "--output", output)
    with pytest.raises(UserError, match="is there already"):
        export(*arguments)
    assert output.read_text(encoding="utf-8") == "something"
    export(*arguments, "--overwrite")
    assert load_file(output)
    with pytest.raises(UserError, match="is, or holds, the LoRA itself"):
        export(file, "--format", "diffusers", "--output", file, "--overwrite")


def test_a_folder_with_other_things_is_not_replaced(tmp_path: Path) -> None:
    file = lora(tmp_path / "cat.safetensors", lora_weights(torch.ones(1, 4), torch.ones(4, 1)))
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "letter.txt").write_text("dear", encoding="utf-8")
    with pytest.raises(UserError, match="other things in it"):
        export(file, "--format", "peft", "--output", folder, "--overwrite")
    assert (folder / "letter.txt").exists()
    (folder / "letter.txt").unlink()
    export(file, "--format", "peft", "--output", folder, "--overwrite")
    with pytest.raises(UserError, match="is, or holds, the LoRA itself"):
        export(folder, "--format", "peft", "--output", folder, "--overwrite")
    export(file, "--format", "peft", "--output", folder, "--overwrite")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--format nonsense --output a.safetensors", "--format: unknown name 'nonsense'"),
        ("--format kohya --output a.ckpt", r"a\.ckpt: the format kohya is a \.safetensors file"),
        ("--format peft --output a.safetensors", "the format peft is a folder"),
        ("--format kohya", "--output"),
        ("--format kohya --output a.safetensors --family nonsense", "unknown name 'nonsense'"),
        ("--format kohya --output a.safetensors", "may be those of sd, sdxl: give --family"),
        ("--format kohya --output a.safetensors --family sana", "has this model"),
        ("--format comfyui --output a.safetensors --family z_image", "no names for the unet, only for the transformer"),
        ("--format kohya --output cat.safetensors/a.safetensors --family sd", r"cat\.safetensors is a file, and no"),
        ("--format kohya --output a.safetensors --pretrained_model_name_or_path nowhere/at/all", "nowhere"),
    ],
)
def test_mistakes_are_told_and_nothing_written(flags: str, words: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = lora(tmp_path / "cat.safetensors", lora_weights(torch.ones(1, 4), torch.ones(4, 1)))
    with pytest.raises(UserError, match=words):
        export(file, *flags.split())
    assert [path.name for path in tmp_path.iterdir()] == ["cat.safetensors"]


def test_a_link_to_nowhere_is_not_replaced_unasked(tmp_path: Path) -> None:
    file, output = lora(tmp_path / "cat.safetensors", lora_weights(torch.ones(1, 4), torch.ones(4, 1))), tmp_path / "to"
    link = output.with_suffix(".safetensors")
    link.symlink_to(tmp_path / "unplugged" / "dog.safetensors")
    with pytest.raises(UserError, match=r"is there already"):
        export(file, "--format", "diffusers", "--output", link)
    assert link.is_symlink()


def test_a_strangers_run_does_not_have_its_model_opened(case, tmp_path: Path) -> None:
    family, model, run = case
    output = tmp_path / "out.safetensors"
    if family == "z_image":  # its names tell
        export(run, "--format", "kohya", "--output", output)
        assert output.exists()
        return
    with pytest.raises(UserError, match=r"sd, sdxl\. Its base model is not opened: give .*--trust_runs"):
        export(run, "--format", "kohya", "--output", output)
    export(run, "--format", "kohya", "--output", output, "--pretrained_model_name_or_path", model)


def test_a_base_model_out_of_reach_is_done_without(tmp_path: Path, caplog) -> None:
    """With the family that the run or a flag names, or that the names tell."""
    run = tmp_path / "run"
    lora(run / "pytorch_lora_weights.safetensors", lora_weights(torch.ones(1, 4), torch.ones(4, 1)))
    options = "pretrained_model_name_or_path: somebody/that-is-not-here\n"
    (run / "config.yaml").write_text(options, encoding="utf-8")
    output = tmp_path / "out.safetensors"
    with pytest.raises(UserError, match="give --family"):
        export(run, "--format", "kohya", "--output", output)
    assert "the base model of run is not looked at" in caplog.text
    (run / "config.yaml").write_text(options + "family: sd\n", encoding="utf-8")
    export(run, "--format", "kohya", "--output", output)
    assert "lora_unet_mid_block_attentions_0_proj_in.alpha" in load_file(output)
    export(run, "--format", "kohya", "--output", output, "--overwrite", "--family", "sdxl")
    assert "lora_unet_middle_block_1_proj_in.alpha" in load_file(output)


@pytest.mark.parametrize("kind", ["loha", "lokr"])
def test_kinds_that_a_format_cannot_hold_are_refused(kind: str, tmp_path: Path) -> None:
    layer = "lora_unet_mid_block_attentions_0_proj_in"
    ends = {
        "loha": {f"hada_w{n}_{f}": torch.ones(s) for n in (1, 2) for f, s in (("a", (4, 1)), ("b", (1, 4)))},
        "lokr": {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(2, 2)},
    }[kind]
    file = tmp_path / "cat.safetensors"
    save_file({f"{layer}.{end}": tensor for end, tensor in ends.items()}, file)
    with pytest.raises(UserError, match=f"--format diffusers: diffusers' files hold LoRAs and DoRAs alone.*{kind}"):
        export(file, "--format", "diffusers", "--output", tmp_path / "out.safetensors", "--family", "sd")
    for form in ("kohya", "comfyui"):
        export(file, "--format", form, "--output", tmp_path / f"{form}.safetensors", "--family", "sd")
    export(file, "--format", "peft", "--output", tmp_path / "peft", "--family", "sd")
