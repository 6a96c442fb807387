"""LoRA files: what is refused with which words, and that applying one does what the adapter in training did."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from dreamlora.config import Lora
from dreamlora.errors import UserError
from dreamlora.families import sd
from dreamlora.lora.applying import apply_lora
from dreamlora.lora.files import read_lora, same_lora
from dreamlora.lora.inject import add_lora, trainable_parameters
from dreamlora.lora.names import names_of
from dreamlora.lora.saving import save_lora
from tests.fuzzing import as_json, changed, damaged, fuzzed, harmless

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
    return save_lora(tmp_path / "lora", {"unet": donor.unet, "text_encoder": donor.text_encoder})


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
    kohya = as_kohya(lora, tmp_path / "kohya.safetensors")
    assert (read_lora(lora).format, read_lora(kohya).format) == ("diffusers", "kohya")
    apply_lora(pipeline, lora)
    apply_lora(other, kohya, model=names_of(sd, other.unet.config))
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


def test_an_interrupted_run_says_what_it_has(tmp_path):
    """And what a run keeps besides, such as its evaluation set, is not taken for a LoRA."""
    (tmp_path / "config.yaml").write_text("{}", encoding="utf-8")
    (tmp_path / "evalset.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"is a run without a LoRA yet: it has no checkpoint"):
        read_lora(tmp_path)
    for step in (3, 6):
        (tmp_path / "checkpoints" / f"step-{step:06d}").mkdir(parents=True)
    with pytest.raises(UserError, match=r"has not ended: give a checkpoint, such as .*checkpoints/step-000006$"):
        read_lora(tmp_path)
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"such as .*/best or .*checkpoints/step-000006$"):
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


NAME = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def pair(A: tuple[int, ...], B: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {f"{NAME}.lora_A.weight": torch.ones(A).to(dtype), f"{NAME}.lora_B.weight": torch.ones(B).to(dtype)}


def with_alpha(alpha: torch.Tensor) -> dict[str, torch.Tensor]:
    factors = {f"{KOHYA}.lora_down.weight": torch.ones(2, 16), f"{KOHYA}.lora_up.weight": torch.ones(16, 2)}
    return {**factors, f"{KOHYA}.alpha": alpha}


HOSTILE = {
    "rank 0": lambda: pair((0, 16), (16, 0)),
    "nothing in it": lambda: pair((2, 0), (16, 2)),
    "kernels for a linear layer": lambda: pair((2, 16, 3, 3), (16, 2, 1, 1)),
    "one dimension": lambda: pair((16,), (16,)),
    "no dimension": lambda: pair((), ()),
    "twelve dimensions": lambda: pair((2, 16, *[1] * 10), (16, 2, *[1] * 10)),
    "whole numbers": lambda: pair((2, 16), (16, 2), torch.int64),
    "bits": lambda: pair((2, 16), (16, 2), torch.bool),
    "complex numbers": lambda: pair((2, 16), (16, 2), torch.complex64),
    "a type of exponents": lambda: pair((2, 16), (16, 2), torch.float8_e8m0fnu),
    "two alphas": lambda: with_alpha(torch.ones(2)),
    "no alpha": lambda: with_alpha(torch.ones(0)),
    "an alpha that is true": lambda: with_alpha(torch.tensor(True)),
    "a complex alpha": lambda: with_alpha(torch.tensor(1j)),
    "an endless alpha": lambda: with_alpha(torch.tensor(torch.inf)),
    "a huge alpha": lambda: with_alpha(torch.tensor(1e30)),
    "a class": lambda: {f"unet.__class__.lora_{factor}.weight": torch.ones(2, 2) for factor in "AB"},
    "a method": lambda: {f"unet.forward.lora_{factor}.weight": torch.ones(2, 2) for factor in "AB"},
    "a whole model": lambda: {f"unet.lora_{factor}.weight": torch.ones(2, 2) for factor in "AB"},
    "a norm": lambda: {f"unet.conv_norm_out.lora_{factor}.weight": torch.ones(2, 2) for factor in "AB"},
    "the autoencoder": lambda: {f"vae.decoder.conv_in.lora_{factor}.weight": torch.ones(2, 2) for factor in "AB"},
    "a wrapper": lambda: {f"base_model.model.{key}": tensor for key, tensor in pair((2, 16), (16, 2)).items()},
    "a name of dots": lambda: {f"unet.{'.' * 400}.lora_{factor}.weight": torch.ones(2, 2) for factor in "AB"},
    "an expression": lambda: {f"unet.(.*)*!.lora_{factor}.weight": torch.ones(2, 2) for factor in "AB"},
    "digits": lambda: {f"lora_unet_{'1' * 400}.lora_{factor}.weight": torch.ones(2, 2) for factor in ("down", "up")},
    "marks alone": lambda: {"lora." * 90 + ".lora_A" * 10: torch.ones(2, 2)},
    "the same layer twice": lambda: {
        **pair((2, 16), (16, 2)),
        **{key.replace(".weight", ".default.weight"): tensor for key, tensor in pair((2, 16), (16, 2)).items()},
    },
}


@pytest.mark.parametrize("tensors", HOSTILE.values(), ids=HOSTILE)
def test_tensors_that_no_lora_has_are_one_message(tensors, pipeline, tmp_path):
    save_file(tensors(), tmp_path / "lora.safetensors")
    for names in (None, names_of(sd, pipeline.unet.config)):
        error = harmless(lambda names=names: apply_lora(pipeline, tmp_path / "lora.safetensors", model=names))
        assert isinstance(error, UserError) and len(str(error)) < 1200
    assert not any("lora" in name for name, _ in pipeline.unet.named_parameters())


def test_more_than_the_model_has_is_not_read(pipeline, tmp_path):
    """A file of zeros takes no place on the disk, and all of them in memory."""
    numbers = 2**26 + 2
    data = {"dtype": "F32", "shape": [2, numbers // 2], "data_offsets": [0, 4 * numbers]}
    header = json.dumps({f"{NAME}.lora_A.weight": data}).encode()
    with (tmp_path / "lora.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * numbers)
    error = harmless(lambda: apply_lora(pipeline, tmp_path / "lora.safetensors"))
    assert isinstance(error, UserError) and "it is no LoRA" in str(error)


def test_many_layers_of_many_ranks_take_no_time(pipeline, tmp_path):
    """PEFT would look for each of them with the pattern of each other."""
    layers = [
        (name, layer.weight.shape)
        for name, layer in pipeline.unet.named_modules()
        if isinstance(layer, torch.nn.Linear) and "block" in name
    ]
    tensors = {}
    for number, (name, (m, n)) in enumerate(layers, start=1):
        tensors |= {
            f"unet.{name}.lora_A.weight": torch.ones(number, n),
            f"unet.{name}.lora_B.weight": torch.ones(m, number),
        }
    save_file(tensors, tmp_path / "lora.safetensors")
    harmless(lambda: apply_lora(pipeline, tmp_path / "lora.safetensors"))
    ranks = [m.r["default"] for m in pipeline.unet.modules() if "default" in getattr(m, "r", ())]
    assert sorted(ranks) == list(range(1, len(layers) + 1))
    pipeline.unload_lora_weights()


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "device.safetensors").symlink_to("/dev/zero")
    for name in ("pipe", "device"):
        with pytest.raises(UserError):
            read_lora(tmp_path / f"{name}.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(UserError, match="found no"):
        read_lora(tmp_path / "folder.safetensors")


def test_links_that_a_person_names_are_followed(lora, tmp_path):
    (tmp_path / "link.safetensors").symlink_to(lora)
    assert read_lora(tmp_path / "link.safetensors").shapes == read_lora(lora).shapes


def test_same_lora_knows_all_types(tmp_path):
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    kinds = [torch.float8_e4m3fn, torch.complex64, torch.bool, torch.int64, torch.float8_e8m0fnu]
    for dtype in kinds:
        for file in files:
            save_file({"a": torch.ones(2, 3).to(dtype), "b": torch.ones(()).to(dtype)}, file)
        assert same_lora(*files)
        save_file({"a": torch.ones(2, 3), "b": torch.ones(())}, files[1])
        assert not same_lora(*files)


SOUND = {**pair((2, 16), (16, 2)), f"{NAME.replace('to_q', 'to_k')}.lora_A.weight": torch.ones(2, 16)}
SOUND[f"{NAME.replace('to_q', 'to_k')}.lora_B.weight"] = torch.ones(16, 2)
PRODUCTS = {
    f"{KOHYA}.hada_w{n}_{x}": torch.ones(shape) for n in (1, 2) for x, shape in (("a", (16, 2)), ("b", (2, 16)))
}
PRODUCTS |= {f"{KOHYA[:-1]}k.{name}": torch.ones(4, 4) for name in ("lokr_w1", "lokr_w2")}
PRODUCTS |= {f"{KOHYA[:-1]}v.{end}": each for end, each in (("lora_down.weight", torch.ones(2, 16)),)}
PRODUCTS |= {f"{KOHYA[:-1]}v.lora_up.weight": torch.ones(16, 2), f"{KOHYA[:-1]}v.dora_scale": torch.ones(16, 1)}
BYTES = [save(SOUND), save(with_alpha(torch.tensor(2.0))), save(PRODUCTS)]


def headers_changed(content: bytes) -> st.SearchStrategy[bytes]:
    end = 8 + int.from_bytes(content[:8], "little")

    def put(header: object) -> bytes:
        text = as_json(header)
        return len(text).to_bytes(8, "little") + text + content[end:]

    return changed(json.loads(content[8:end])).map(put)


def renamed(content: bytes) -> st.SearchStrategy[bytes]:
    """Other letters in names, so that the header stays sound."""
    end = 8 + int.from_bytes(content[:8], "little")
    letters = st.lists(st.tuples(st.integers(8, end - 1), st.sampled_from(b"._0129abAB")), min_size=1, max_size=4)

    def put(changes: list[tuple[int, int]]) -> bytes:
        copy = bytearray(content)
        for place, letter in changes:
            copy[place] = letter
        return bytes(copy)

    return letters.map(put)


@pytest.fixture(scope="module")
def target(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[DiffusionPipeline, Path]:
    return DiffusionPipeline.from_pretrained(sd_folder), tmp_path_factory.mktemp("fuzz") / "lora.safetensors"


@fuzzed
@given(st.sampled_from(BYTES).flatmap(lambda sound: st.one_of(damaged(sound), headers_changed(sound), renamed(sound))))
def test_fuzz_lora_file(target: tuple[DiffusionPipeline, Path], content: bytes) -> None:
    pipeline, file = target
    file.write_bytes(content)
    for names in (None, names_of(sd, pipeline.unet.config)):
        if not isinstance(harmless(lambda names=names: apply_lora(pipeline, file, model=names)), UserError):
            pipeline.unload_lora_weights()
        left = (name for name, _ in pipeline.unet.named_parameters())
        assert not any(part in name for name in left for part in ("lora", "hada", "lokr"))
