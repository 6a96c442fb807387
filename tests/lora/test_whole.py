"""LoRAs that hold more than the loader applies are refused by name; those of other makers that it can apply are not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from dreamlora.config import Lora
from dreamlora.errors import UserError
from dreamlora.families import flux, sd
from dreamlora.lora.applying import apply_lora
from dreamlora.lora.files import read_lora
from dreamlora.lora.inject import add_lora, trainable_parameters
from dreamlora.lora.names import ModelNames, names_of
from dreamlora.lora.saving import save_lora
from tests.lora.test_files import image

Tensors = dict[str, Tensor]
FAMILIES = {"sd": sd, "flux": flux}


@pytest.fixture(scope="module", params=["sd", "flux"])
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(family: str, sd_folder: Path, flux_folder: Path) -> Path:
    return {"sd": sd_folder, "flux": flux_folder}[family]


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> DiffusionPipeline:
    """Of all tests: what is refused leaves nothing in it, and what is applied is taken out again."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def names(family: str, pipeline: DiffusionPipeline) -> ModelNames | None:
    return names_of(FAMILIES[family], getattr(pipeline, FAMILIES[family].DENOISER).config)


@pytest.fixture(scope="module")
def own(family: str, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tensors:
    """A LoRA of attention layers in diffusers' naming; alpha is the rank."""
    donor = getattr(DiffusionPipeline.from_pretrained(folder), FAMILIES[family].DENOISER)
    layers = ["to_q", "to_k", "to_v", "to_out.0"] if family == "sd" else ["attn.to_q", "attn.to_k", "attn.to_v"]
    add_lora(donor, Lora(rank=2, lora_alpha=2), layers)
    draw = torch.Generator().manual_seed(0)
    for parameter in trainable_parameters(donor).values():
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.2
    return load_file(save_lora(tmp_path_factory.mktemp("own"), {FAMILIES[family].DENOISER: donor}))


def written(tensors: Tensors, tmp_path: Path) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "other.safetensors")
    return tmp_path / "other.safetensors"


def diffusers(tensors: Tensors) -> Tensors:
    return dict(tensors)


def old_diffusers(tensors: Tensors) -> Tensors:
    """Before PEFT: processor names for attention layers."""
    return {
        name.replace(".lora_A.", ".lora.down.").replace(".lora_B.", ".lora.up."): tensor
        for name, tensor in tensors.items()
    }


def kohya(tensors: Tensors) -> Tensors:
    """kohya's names, with alphas; of FLUX its own layers, of which q, k and v are one."""
    made: Tensors = {}
    for name, tensor in tensors.items():
        component, _, rest = name.partition(".")
        layer, _, factor = rest.partition(".lora_")
        prefix = "lora_unet_" if component in ("unet", "transformer") else "lora_te_"
        made[f"{prefix}{layer.replace('.', '_')}.lora_{'down' if factor[0] == 'A' else 'up'}.weight"] = tensor
        made[f"{prefix}{layer.replace('.', '_')}.alpha"] = torch.tensor(2.0)
    return made


def kohya_flux() -> Tensors:
    """What sd-scripts writes of the double block's attention and of the single block's first layer."""
    made: Tensors = {}
    draw = torch.Generator().manual_seed(0)
    for layer, wide in (("double_blocks_0_img_attn_qkv", 96), ("double_blocks_0_txt_attn_qkv", 96)):
        made[f"lora_unet_{layer}.lora_down.weight"] = torch.randn(2, 32, generator=draw)
        made[f"lora_unet_{layer}.lora_up.weight"] = torch.randn(wide, 2, generator=draw)
        made[f"lora_unet_{layer}.alpha"] = torch.tensor(2.0)
    return made


NAMINGS: dict[str, list[Callable[[Tensors], Tensors]]] = {
    "sd": [diffusers, old_diffusers, kohya],
    "flux": [diffusers, lambda tensors: kohya_flux()],
}


@pytest.mark.parametrize("naming", [0, 1, 2])
def test_what_other_makers_write_is_applied(family, pipeline, own, names, naming, tmp_path):
    if naming >= len(NAMINGS[family]):
        pytest.skip("this family has fewer namings")
    before = image(pipeline)
    apply_lora(pipeline, written(NAMINGS[family][naming](own), tmp_path), model=names)
    changed = (image(pipeline) - before).abs().max()
    pipeline.unload_lora_weights()
    assert changed > 1e-3 and torch.equal(image(pipeline), before)


def untouched(pipeline: DiffusionPipeline) -> bool:
    modules = [part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)]
    return not any("lora" in name for module in modules for name, _ in module.named_parameters())


def first_layer(tensors: Tensors) -> tuple[str, str]:
    """A layer, and what joins its name and what is added to it."""
    name = next(iter(tensors))
    for mark in (".lora_A", ".lora.down", ".lora_down"):
        if mark in name:
            return name.split(mark)[0], name
    raise AssertionError(name)


MORE = {
    "oft_blocks": "OFT",
    "oft_diag": "OFT",
    "diff": "whole weights",
    "diff_b": "whole weights",
    "set_weight": "whole weights",
    "w_norm": "norm",
    "b_norm": "norm",
    "bias": "bias",
    "lora_B.bias": "bias",
    "lora_up.bias": "bias",
    "a1.weight": "GLoRA",
    "on_input": "IA",
    "something": "not known",
}


@pytest.mark.parametrize("suffix", MORE)
@pytest.mark.parametrize("naming", [0, 1, 2])
def test_what_the_loader_would_drop_is_refused_by_name(family, pipeline, own, naming, suffix, tmp_path):
    if naming >= len(NAMINGS[family]):
        pytest.skip("this family has fewer namings")
    tensors = NAMINGS[family][naming](own)
    layer, _ = first_layer(tensors)
    path = written({**tensors, f"{layer}.{suffix}": torch.ones(2, 2)}, tmp_path)
    with pytest.raises(UserError, match=rf"{MORE[suffix]}") as refusal:
        apply_lora(pipeline, path)
    assert f"{layer}.{suffix}" in str(refusal.value) and "1 of" in str(refusal.value)
    assert untouched(pipeline)


@pytest.mark.parametrize("suffix", [suffix for suffix, kind in MORE.items() if kind != "not known"])
def test_known_kinds_are_refused_before_a_model_is_loaded(family, own, suffix, tmp_path):
    with pytest.raises(UserError, match=MORE[suffix]):
        read_lora(written({**own, f"{first_layer(own)[0]}.{suffix}": torch.ones(2, 2)}, tmp_path))


PARTS = [
    "dora_scale",
    "lora_magnitude_vector.weight",
    "hada_w1_a",
    "hada_w2_b",
    "lokr_w1",
    "lokr_w2_a",
    "lora_mid.weight",
]


@pytest.mark.parametrize("suffix", PARTS)
@pytest.mark.parametrize("naming", [0, 1, 2])
def test_parts_of_another_adapter_in_the_same_layer(family, pipeline, own, names, naming, suffix, tmp_path):
    if naming >= len(NAMINGS[family]):
        pytest.skip("this family has fewer namings")
    tensors = NAMINGS[family][naming](own)
    layer, _ = first_layer(tensors)
    path = written({**tensors, f"{layer}.{suffix}": torch.ones(3, 3)}, tmp_path)
    with pytest.raises(UserError) as refusal:
        apply_lora(pipeline, path, model=names)
    assert layer in str(refusal.value) and untouched(pipeline)


@pytest.mark.parametrize("suffix", ["oft_blocks", "diff"])
def test_files_of_nothing_else_are_named_too(suffix, tmp_path):
    tensors = {f"lora_unet_mid_block_attentions_0_proj_in.{suffix}": torch.ones(2, 2)}
    with pytest.raises(UserError, match=MORE[suffix]):
        read_lora(written(tensors, tmp_path))


def without_partner(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != next(iter(tensors))}


def with_alpha_of_nothing(tensors: Tensors) -> Tensors:
    layer, _ = first_layer(tensors)
    return {**tensors, layer.replace("to_q", "to_x").replace("to_k", "to_x") + "y.alpha": torch.tensor(2.0)}


def with_other_ranks(tensors: Tensors) -> Tensors:
    name = next(name for name in tensors if "lora_A" in name or "down" in name)
    return {**tensors, name: torch.cat([tensors[name]] * 2)}


@pytest.mark.parametrize("damage", [without_partner, with_alpha_of_nothing, with_other_ranks])
@pytest.mark.parametrize("naming", [0, 1, 2])
def test_what_does_not_belong_together_is_refused(family, pipeline, own, names, naming, damage, tmp_path):
    if naming >= len(NAMINGS[family]):
        pytest.skip("this family has fewer namings")
    with pytest.raises(UserError):
        apply_lora(pipeline, written(damage(NAMINGS[family][naming](own)), tmp_path), model=names)
    assert untouched(pipeline)


def test_a_second_text_encoder_that_the_pipeline_lacks(sd_folder, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(sd_folder)
    names = names_of(sd, pipeline.unet.config)
    layer = "lora_te2_text_model_encoder_layers_0_self_attn_q_proj"
    tensors = {f"{layer}.lora_down.weight": torch.ones(2, 16), f"{layer}.lora_up.weight": torch.ones(16, 2)}
    with pytest.raises(UserError, match=r"lora_te2_.* is no layer of a text encoder that can have an adapter here"):
        apply_lora(pipeline, written(tensors, tmp_path), model=names)


def test_keys_of_another_prefix(family, pipeline, own, tmp_path):
    extra = {f"other.{name}": tensor.clone() for name, tensor in list(own.items())[:2]}
    with pytest.raises(UserError, match="other"):
        apply_lora(pipeline, written({**own, **extra}, tmp_path))


def flux_with(layer: str, width: int) -> Tensors:
    factors = {"lora_down.weight": torch.ones(2, width), "lora_up.weight": torch.ones(width, 2)}
    more = {f"{layer}.{factor}": tensor for factor, tensor in {**factors, "alpha": torch.tensor(2.0)}.items()}
    return {**kohya_flux(), **more}


def test_text_encoders_of_flux(flux_folder, tmp_path):
    """CLIP's are applied; the loader passes over T5's without a word."""
    pipeline = DiffusionPipeline.from_pretrained(flux_folder)
    for number in (2, 3):
        t5 = f"lora_te{number}_encoder_block_0_layer_0_SelfAttention_q"
        with pytest.raises(UserError, match=rf"lora_te{number}_.*belongs to no layer"):
            apply_lora(pipeline, written(flux_with(t5, 24), tmp_path))
    clip = "lora_te1_text_model_encoder_layers_0_self_attn_"
    apply_lora(pipeline, written({**flux_with(f"{clip}q_proj", 16), **flux_with(f"{clip}out_proj", 16)}, tmp_path))
    assert not untouched(pipeline) and hasattr(pipeline.text_encoder, "peft_config")


def test_what_diffusers_cannot_read_is_one_message(flux_folder, sd_folder, tmp_path):
    cases: list[tuple[Path, Tensors, str]] = []
    layer = "lora_te1_text_model_encoder_layers_0_self_attn_q_proj"  # it looks for other layers to know the format
    cases.append((flux_folder, flux_with(layer, 16), "infer state dict type"))
    small = {"unet.conv_in.lora_A.weight": torch.ones(2, 4, 1, 1), "unet.conv_in.lora_B.weight": torch.ones(8, 2, 1, 1)}
    cases.append((sd_folder, small, "conv_in"))
    for folder, tensors, words in cases:
        pipeline = DiffusionPipeline.from_pretrained(folder)
        with pytest.raises(UserError, match=words):
            apply_lora(pipeline, written(tensors, tmp_path))
        assert untouched(pipeline)


def test_what_is_dropped_but_zero_does_no_harm(flux_folder, tmp_path):
    """Some trainers write all layers, and zeros where nothing was learned; the loader leaves those out."""
    pipeline = DiffusionPipeline.from_pretrained(flux_folder)
    pipeline.set_progress_bar_config(disable=True)
    biases = {"lora_unet_double_blocks_0_img_attn_qkv.diff_b": torch.zeros(96)}
    apply_lora(pipeline, written({**kohya_flux(), **biases}, tmp_path))


def alphas_multiplied_in(tensors: Tensors) -> Tensors:
    """The same LoRA with alphas that are the rank; a layer without one has that already."""
    made = dict(tensors)
    for key, alpha in tensors.items():
        if key.endswith(".alpha"):
            up = key.replace(".alpha", ".lora_up.weight")
            rank = tensors[up].shape[1]
            made |= {up: tensors[up] * (alpha / rank), key: torch.tensor(float(rank))}
    return made


def test_every_layer_has_its_own_alpha(family, pipeline, own, names, tmp_path):
    """diffusers gives attention layers and text encoders the commonest, and it to layers that have none."""
    tensors = kohya(own) if family == "sd" else kohya_flux()
    draw = torch.Generator().manual_seed(1)
    for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer = f"lora_te{'' if family == 'sd' else '1'}_text_model_encoder_layers_0_self_attn_{part}"
        factors = {
            "lora_down.weight": torch.randn(2, 16, generator=draw),
            "lora_up.weight": torch.randn(16, 2, generator=draw),
            "alpha": torch.tensor(2.0),
        }
        tensors |= {f"{layer}.{name}": tensor for name, tensor in factors.items()}
    alphas = [name for name in tensors if name.endswith(".alpha")]
    for number, name in enumerate(alphas):
        tensors[name] = torch.tensor((8.0, 2.0, 0.5, 4.0, 8.0)[number % 5])
    drawn = []
    for each in (tensors, alphas_multiplied_in(tensors)):
        apply_lora(pipeline, written(each, tmp_path), model=names)
        drawn.append(image(pipeline))
        pipeline.unload_lora_weights()
    assert torch.allclose(*drawn, atol=1e-4) and not torch.allclose(drawn[0], image(pipeline), atol=1e-2)


def test_a_layer_without_alpha_has_its_rank(sd_folder, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(sd_folder)
    drawn = []
    pipeline.set_progress_bar_config(disable=True)
    attention = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_"
    draw = torch.Generator().manual_seed(2)
    width = pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.in_features
    layers = {
        f"{attention}{part}.{factor}.weight": torch.randn(shape, generator=draw)
        for part in ("to_q", "to_k", "to_v")
        for factor, shape in (("lora_down", (2, width)), ("lora_up", (width, 2)))
    }
    some = {**layers, f"{attention}to_q.alpha": torch.tensor(0.5)}
    for each in (some, alphas_multiplied_in(some)):
        apply_lora(pipeline, written(each, tmp_path))
        drawn.append(image(pipeline))
        pipeline.unload_lora_weights()
    assert torch.allclose(*drawn, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda name, tensor: {name: tensor * float("nan")}, "is not finite"),
        (lambda name, tensor: {name: (tensor * 100).to(torch.int8)}, "quantised"),
        (lambda name, tensor: {name.replace(".weight", ".one.weight"): tensor}, "adapters with names of their own"),
        (
            lambda name, tensor: {name.replace(".weight", f".{one}.weight"): tensor + 0 for one in ("a", "b")},
            "adapters with names of their own",
        ),
    ],
)
def test_values_and_names_that_no_loader_can_mean(family, pipeline, own, change, words, tmp_path):
    tensors: Tensors = {}
    for name, tensor in own.items():
        tensors |= change(name, tensor)
    with pytest.raises(UserError, match=words):
        apply_lora(pipeline, written(tensors, tmp_path))
    assert untouched(pipeline)


@pytest.mark.parametrize("alpha", [0.0, -2.0])
def test_an_alpha_that_is_not_above_zero_is_refused(family, pipeline, own, alpha, tmp_path):
    """Of a negative one of FLUX diffusers looks for a power of two for ever."""
    tensors = kohya(own) if family == "sd" else kohya_flux()
    tensors = {name: torch.tensor(alpha) if name.endswith("alpha") else tensor for name, tensor in tensors.items()}
    with pytest.raises(UserError, match=rf"the alpha of .* is {alpha:g}, and must be above 0"):
        apply_lora(pipeline, written(tensors, tmp_path))
    part = FAMILIES[family].DENOISER
    settings = json.dumps({f"{part}.r": 2, f"{part}.lora_alpha": alpha, f"{part}.target_modules": ["to_q", "to_k"]})
    tensors = {name: tensor.contiguous() for name, tensor in own.items() if "to_q" in name or "to_k" in name}
    save_file(tensors, tmp_path / "other.safetensors", metadata={"lora_adapter_metadata": settings})
    with pytest.raises(UserError, match=rf"the alpha of .* is {alpha:g}, and must be above 0"):
        apply_lora(pipeline, tmp_path / "other.safetensors")
    assert untouched(pipeline)


def test_the_name_that_peft_gives_an_adapter_may_stand_in_the_file(family, pipeline, own, tmp_path):
    drawn = []
    for each in (own, {name.replace(".weight", ".default.weight"): tensor for name, tensor in own.items()}):
        apply_lora(pipeline, written(each, tmp_path))
        drawn.append(image(pipeline))
        pipeline.unload_lora_weights()
    assert torch.equal(*drawn)


@pytest.mark.parametrize(
    "settings",
    ["{x", "[1]", '{"PART.foo": 1}', '{"PART.r": 3, "PART.lora_alpha": 3, "PART.target_modules": ["to_q"]}'],
)
def test_metadata_that_is_none_of_this_lora_s(family, pipeline, own, settings, tmp_path):
    settings = settings.replace("PART", FAMILIES[family].DENOISER)
    tensors = {name: tensor.contiguous() for name, tensor in own.items()}
    save_file(tensors, tmp_path / "other.safetensors", metadata={"lora_adapter_metadata": settings})
    with pytest.raises(UserError) as refusal:
        apply_lora(pipeline, tmp_path / "other.safetensors")
    assert len(str(refusal.value)) < 600 and untouched(pipeline)
