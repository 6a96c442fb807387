"""LoRA files: what is refused with which words, and that applying one does what the adapter in training did."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from dreamlora.config import Lora
from dreamlora.errors import UserError
from dreamlora.families import sd
from dreamlora.lora.files import apply_lora, read_lora, same_lora
from dreamlora.lora.inject import add_lora, trainable_parameters

TEXT_LAYERS = sd.TEXT_LORA_LAYERS


@pytest.fixture
def pipeline(sd_folder) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def lora(sd_folder, tmp_path) -> Path:
    """A LoRA of UNet (convolutions too) and text encoder, alpha twice the rank."""
    donor = DiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    add_lora(donor.unet, Lora(rank=2, lora_alpha=4), ["all"])
    add_lora(donor.text_encoder, Lora(rank=2, lora_alpha=4), TEXT_LAYERS)
    draw = torch.Generator().manual_seed(0)
    for module in (donor.unet, donor.text_encoder):
        for parameter in trainable_parameters(module).values():
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.2
    return sd.save_lora(tmp_path / "lora", donor.unet, {"text_encoder": donor.text_encoder})


def image(pipeline: DiffusionPipeline) -> torch.Tensor:
    return pipeline(
        "a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="latent"
    ).images


def merged(pipeline: DiffusionPipeline, file: Path, scale: float) -> None:
    """Add scale * (alpha / rank = 2) * B A to the weights, without any LoRA code."""
    tensors = load_file(file)
    for key, down in tensors.items():
        if ".lora_A" not in key:
            continue
        up = tensors[key.replace("lora_A", "lora_B")]
        component, _, name = key.partition(".")
        module = getattr(pipeline, component)
        name = name.split(".lora_A")[0]
        weight = module.get_submodule(
            name if hasattr(module, "text_model") else name.removeprefix("text_model.")
        ).weight
        product = (
            torch.einsum("or...,ri...->oi...", up, down)
            if up.dim() == 2
            else torch.einsum("orxy,ri...->oi...", up, down)
        )
        weight.data += scale * 2 * product


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_applied_lora_equals_merged_weights(pipeline, lora, sd_folder, scale):
    by_hand = DiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    before = image(by_hand)
    merged(by_hand, lora, scale)
    apply_lora(pipeline, lora.parent, scale)
    torch.testing.assert_close(image(pipeline), image(by_hand), rtol=1e-4, atol=1e-4)
    assert (image(pipeline) - before).abs().max() > 0.01


def test_one_after_another(pipeline, lora):
    """Unloading leaves nothing behind that the check or the next LoRA would stumble over."""
    before = image(pipeline)
    found = []
    for scale in (1.0, 0.5, 1.0):
        apply_lora(pipeline, lora, scale)
        found.append(image(pipeline))
        pipeline.unload_lora_weights()
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    assert torch.equal(image(pipeline), before)


def test_denoiser_only(pipeline, lora):
    tensors = {key: value for key, value in load_file(lora).items() if key.startswith("unet.")}
    save_file(tensors, lora)
    apply_lora(pipeline, lora)
    assert not hasattr(pipeline.text_encoder, "peft_config")


def as_kohya(file: Path, target: Path) -> Path:
    """The same LoRA under kohya's names, with its alpha as a tensor."""
    out = {}
    for key, value in load_file(file).items():
        component, _, name = key.partition(".")
        layer, _, factor = name.partition(".lora_")
        prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_"}[component] + layer.replace(".", "_")
        out[f"{prefix}.lora_{'down' if factor.startswith('A') else 'up'}.weight"] = value
        out[f"{prefix}.alpha"] = torch.tensor(4.0)
    save_file(out, target)
    return target


def test_kohya_file_gives_the_same_image(pipeline, lora, sd_folder, tmp_path):
    other = DiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    assert apply_lora(pipeline, lora).format == "diffusers"
    assert apply_lora(other, as_kohya(lora, tmp_path / "kohya.safetensors")).format == "kohya"
    torch.testing.assert_close(image(other), image(pipeline), rtol=1e-4, atol=1e-4)


def test_folder_with_one_file_of_another_name(lora):
    renamed = lora.rename(lora.parent / "cat.safetensors")
    assert read_lora(lora.parent).path == renamed
    save_file(load_file(renamed), lora.parent / "dog.safetensors")
    with pytest.raises(UserError, match=r"cat\.safetensors, dog\.safetensors; name the file"):
        read_lora(lora.parent)


def test_files_are_the_same_by_what_they_hold(tmp_path):
    """With several entries of metadata safetensors writes them in any order."""
    tensors = {"a.lora_A.weight": torch.ones(2, 2), "a.lora_B.weight": torch.zeros(2, 2)}
    metadata = {f"key{number}": "value" for number in range(8)}
    files = [tmp_path / f"{number}.safetensors" for number in range(5)]
    for file in files:
        save_file(tensors, file, metadata)
    assert len({file.read_bytes() for file in files}) > 1, "else bytes could be compared"
    assert all(same_lora(files[0], file) for file in files)
    save_file(tensors, files[1], {**metadata, "key0": "other"})
    save_file({**tensors, "a.lora_A.weight": torch.zeros(2, 2)}, files[2], metadata)
    save_file({"a.lora_A.weight": torch.ones(2, 2)}, files[3], metadata)
    assert not any(same_lora(files[0], file) for file in files[1:4])


def test_nothing_there(tmp_path):
    with pytest.raises(UserError, match="no such LoRA file or folder"):
        read_lora(tmp_path / "missing")
    with pytest.raises(UserError, match=r"expected pytorch_lora_weights\.safetensors, found no"):
        read_lora(tmp_path)


def test_pickles_are_not_opened(tmp_path):
    class Bomb:
        def __reduce__(self):
            return Path.touch, (tmp_path / "exploded",)

    refusals = {"lora.bin": r"as \.safetensors only", "lora.safetensors": "damaged or not a safetensors file"}
    for name, words in refusals.items():
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(UserError, match=words):
            read_lora(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


def test_not_a_lora(sd_folder):
    with pytest.raises(UserError, match=r"is not a LoRA.*it has "):
        read_lora(sd_folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_lora_of_another_model(pipeline, lora):
    good = load_file(lora)
    save_file({key.replace("down_blocks.1", "down_blocks.7"): value for key, value in good.items()}, lora)
    with pytest.raises(UserError, match=r"does not fit.*down_blocks\.7.* names no layer of the unet.*more"):
        apply_lora(pipeline, lora)
    wide = {key: torch.cat([v, v], 1).contiguous() if "attn2.to_k.lora_A" in key else v for key, v in good.items()}
    save_file(wide, lora)
    with pytest.raises(UserError, match=r"to_k\.lora_A\.weight is \(2, 32\), but the layer's weight is \(16, 16\)"):
        apply_lora(pipeline, lora)
    save_file({key.replace("unet.", "transformer."): value for key, value in good.items()}, lora)
    with pytest.raises(UserError, match="is for a 'transformer', which is not loaded"):
        apply_lora(pipeline, lora)
    assert not hasattr(pipeline.unet, "peft_config")


@pytest.mark.parametrize("kohya", [False, True], ids=["diffusers", "kohya"])
def test_weights_keep_their_precision_in_a_model_of_another(sd_folder, lora, tmp_path, kohya):
    """Training keeps them in float32 too; diffusers' loader would round them."""
    pipeline = DiffusionPipeline.from_pretrained(sd_folder, safety_checker=None, torch_dtype=torch.bfloat16)
    apply_lora(pipeline, as_kohya(lora, tmp_path / "kohya.safetensors") if kohya else lora)
    expected = sorted(float(tensor.double().sum()) for tensor in load_file(lora).values())
    loaded = [p for m in (pipeline.unet, pipeline.text_encoder) for n, p in m.named_parameters() if ".lora_" in n]
    assert {parameter.dtype for parameter in loaded} == {torch.float32}
    assert sorted(float(parameter.double().sum()) for parameter in loaded) == expected
    assert pipeline.unet.dtype == torch.bfloat16
    pipeline.unload_lora_weights()
    assert not any(".lora_" in name for name, _ in pipeline.unet.named_parameters())
