"""Small files as other programs write them: all that is in them is read, or refused by its name."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dreamlora import registry
from dreamlora.lora.formats import FileContent
from dreamlora.lora.names import ModelNames
from dreamlora.lora.recognise import format_of

WIDTH = 3


def model_of(family: str) -> ModelNames:
    model: ModelNames = registry.load("families.layers", family).names({})
    return model


class Part(NamedTuple):
    """Rows of a layer in a file, in widths of the model."""

    name: str
    first: int = 0
    count: int = 1
    swapped: bool = False


class File(NamedTuple):
    """A file, and what is in it.

    Attributes:
        family: of the model.
        form: the format's name.
        kind: "down": kohya's factors, with an alpha; "A": PEFT's, without; "lokr".
        layers: of diffusers, by component.
    """

    family: str
    form: str
    kind: str
    layers: dict[str, dict[str, Part]]


def qkv(name: str, layers: tuple[str, ...], before: str = "transformer_blocks.0.attn.") -> dict[str, Part]:
    return {before + layer: Part(name, number) for number, layer in enumerate(layers)}


IMAGE, PROMPT = ("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj")
TEXT = "text_model.encoder.layers.1.mlp.fc1"
FILES = {
    "kohya, FLUX.1": File(
        "flux",
        "kohya",
        "down",
        {
            "transformer": {
                **qkv("lora_unet_double_blocks_0_img_attn_qkv", IMAGE),
                **qkv("lora_unet_double_blocks_0_txt_attn_qkv", PROMPT),
                **qkv("lora_unet_single_blocks_37_linear1", IMAGE, "single_transformer_blocks.37.attn."),
                "single_transformer_blocks.37.proj_mlp": Part("lora_unet_single_blocks_37_linear1", 3, 4),
                "time_text_embed.text_embedder.linear_2": Part("lora_unet_vector_in_out_layer"),
            },
            "text_encoder": {"encoder.layers.1.mlp.fc1": Part("lora_te1_text_model_encoder_layers_1_mlp_fc1")},
        },
    ),
    "kohya, Chroma": File(
        "chroma", "kohya", "down", {"transformer": qkv("lora_unet_double_blocks_0_img_attn_qkv", IMAGE)}
    ),
    "kohya, Stable Diffusion 3.5": File(
        "sd3",
        "kohya",
        "down",
        {
            "transformer": {
                **qkv("lora_unet_joint_blocks_0_x_block_attn_qkv", IMAGE),
                **qkv("lora_unet_joint_blocks_12_x_block_attn2_qkv", IMAGE, "transformer_blocks.12.attn2."),
                "transformer_blocks.4.norm1_context.linear": Part(
                    "lora_unet_joint_blocks_4_context_block_adaLN_modulation_1", 0, 6
                ),
                "transformer_blocks.23.norm1_context.linear": Part(
                    "lora_unet_joint_blocks_23_context_block_adaLN_modulation_1", 0, 2, swapped=True
                ),
            },
            "text_encoder_2": {"encoder.layers.1.mlp.fc1": Part("lora_te2_text_model_encoder_layers_1_mlp_fc1")},
        },
    ),
    "musubi-tuner, FLUX.2": File(
        "flux2",
        "kohya",
        "down",
        {
            "transformer": {
                **qkv("lora_unet_double_blocks_0_txt_attn_qkv", PROMPT),
                "single_transformer_blocks.9.attn.to_qkv_mlp_proj": Part("lora_unet_single_blocks_9_linear1", 0, 9),
            }
        },
    ),
    "ai-toolkit, FLUX.2": File(
        "flux2",
        "comfyui",
        "A",
        {
            "transformer": {
                **qkv("diffusion_model.double_blocks.0.img_attn.qkv", IMAGE),
                "single_transformer_blocks.9.attn.to_out": Part("diffusion_model.single_blocks.9.linear2"),
                "norm_out.linear": Part("diffusion_model.final_layer.adaLN_modulation.1", 0, 2, swapped=True),
            }
        },
    ),
    "ai-toolkit, FLUX.2, LoKr": File(
        "flux2", "comfyui", "lokr", {"transformer": qkv("diffusion_model.double_blocks.0.img_attn.qkv", IMAGE)}
    ),
    "with diffusers' names, FLUX.2": File(
        "flux2",
        "comfyui",
        "A",
        {"transformer": {"transformer_blocks.0.attn.to_q": Part("diffusion_model.transformer_blocks.0.attn.to_q")}},
    ),
    "ai-toolkit, HiDream": File(
        "hidream",
        "comfyui",
        "A",
        {
            "transformer": {
                name: Part(f"diffusion_model.{name}")
                for name in (
                    "double_stream_blocks.0.block.attn1.to_out_t",
                    "single_stream_blocks.31.block.ff_i.experts.3.w2",
                )
            }
        },
    ),
    "OneTrainer, FLUX.1": File(
        "flux",
        "kohya",
        "down",
        {
            "transformer": {
                "transformer_blocks.0.attn.to_q": Part("lora_transformer_transformer_blocks_0_attn_to_q"),
                "transformer_blocks.18.ff.net.0.proj": Part("lora_transformer_transformer_blocks_18_ff_net_0_proj"),
                "single_transformer_blocks.3.proj_mlp": Part("lora_transformer_single_transformer_blocks_3_proj_mlp"),
                "norm_out.linear": Part("lora_transformer_norm_out_linear", 0, 2),
            },
            "text_encoder": {"encoder.layers.1.mlp.fc1": Part("lora_te1_text_model_encoder_layers_1_mlp_fc1")},
        },
    ),
    "OneTrainer, Stable Diffusion 3": File(
        "sd3",
        "kohya",
        "down",
        {
            "transformer": {
                "transformer_blocks.0.attn.to_add_out": Part("lora_transformer_transformer_blocks_0_attn_to_add_out")
            },
            "text_encoder": {"text_projection": Part("lora_te1_text_projection")},
        },
    ),
    "SimpleTuner, FLUX.1, LyCORIS": File(
        "flux",
        "kohya",
        "lokr",
        {
            "transformer": {
                "transformer_blocks.0.attn.add_q_proj": Part("lycoris_transformer_blocks_0_attn_add_q_proj"),
                "single_transformer_blocks.3.proj_mlp": Part("lycoris_single_transformer_blocks_3_proj_mlp"),
            }
        },
    ),
    "SimpleTuner, HiDream, LyCORIS": File(
        "hidream",
        "kohya",
        "lokr",
        {
            "transformer": {
                "double_stream_blocks.14.block.ff_i.experts.0.w1": Part(
                    "lycoris_double_stream_blocks_14_block_ff_i_experts_0_w1"
                ),
                "double_stream_blocks.14.block.attn1.to_v_t": Part(
                    "lycoris_double_stream_blocks_14_block_attn1_to_v_t"
                ),
            }
        },
    ),
    "ComfyUI's own, Stable Diffusion 3": File(
        "sd3",
        "comfyui",
        "down",
        {
            "transformer": qkv("diffusion_model.joint_blocks.0.context_block.attn.qkv", PROMPT),
            "text_encoder": {"encoder.layers.1.mlp.fc1": Part(f"text_encoders.clip_l.transformer.{TEXT}")},
            "text_encoder_2": {"encoder.layers.1.mlp.fc1": Part(f"text_encoders.clip_g.transformer.{TEXT}")},
        },
    ),
    "ComfyUI's own, AuraFlow": File(
        "auraflow",
        "comfyui",
        "down",
        {
            "transformer": {
                "joint_transformer_blocks.3.attn.to_q": Part("diffusion_model.double_layers.3.attn.w2q"),
                "joint_transformer_blocks.3.attn.add_q_proj": Part("diffusion_model.double_layers.3.attn.w1q"),
                "single_transformer_blocks.31.attn.to_q": Part("diffusion_model.single_layers.31.attn.w1q"),
                "norm_out.linear": Part("diffusion_model.modF.1", 0, 2, swapped=True),
            }
        },
    ),
}


def heights(file: File) -> dict[str, int]:
    found: dict[str, int] = {}
    for layers in file.layers.values():
        for part in layers.values():
            found[part.name] = max(found.get(part.name, 0), WIDTH * (part.first + part.count))
    return found


def written(file: File) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Tensors of the file, and ΔW of its layers."""
    draw = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    deltas: dict[str, Tensor] = {}
    for name, rows in heights(file).items():
        if file.kind == "lokr":
            w1, w2 = torch.randn(WIDTH, 2, generator=draw), torch.randn(rows // WIDTH, 4, generator=draw)
            # the alpha of two whole matrices counts for nothing, however large it is
            tensors |= {f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2, f"{name}.alpha": torch.tensor(1e10)}
            deltas[name] = torch.kron(w1, w2)
            continue
        down, up = torch.randn(2, 5, generator=draw), torch.randn(rows, 2, generator=draw)
        ends = ("lora_A", "lora_B") if file.kind == "A" else ("lora_down", "lora_up")
        tensors |= {f"{name}.{end}.weight": factor for end, factor in zip(ends, (down, up), strict=True)}
        deltas[name] = up @ down
        if file.kind == "down":
            tensors[f"{name}.alpha"] = torch.tensor(1.0)
            deltas[name] = up @ down / 2
    return tensors, deltas


@pytest.mark.parametrize("file", FILES.values(), ids=FILES)
def test_all_that_is_in_a_file_is_read(file: File):
    tensors, deltas = written(file)
    module = registry.load("lora.formats", file.form)
    assert format_of(tensors) == file.form
    found = module.read(FileContent(tensors, {}), model_of(file.family))
    assert {component: set(layers) for component, layers in found.items()} == {
        component: set(layers) for component, layers in file.layers.items()
    }
    for component, layers in file.layers.items():
        for layer, part in layers.items():
            rows = deltas[part.name][WIDTH * part.first :][: WIDTH * part.count]
            expected = torch.cat(rows.chunk(2)[::-1]) if part.swapped else rows
            torch.testing.assert_close(found[component][layer].delta(), expected, msg=layer)


def test_of_kohyas_split_qkv_each_layer_has_its_own_ranks():
    """Its B is sparse; a layer that was not trained has zeros alone, and is not read."""
    down, up = torch.randn(6, 5), torch.zeros(3 * WIDTH, 6)
    up[:WIDTH, :2] = torch.randn(WIDTH, 2)
    up[2 * WIDTH :, 4:] = torch.randn(WIDTH, 2)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    content = FileContent(
        {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(3.0)}, {}
    )
    found = registry.load("lora.formats", "kohya").read(content, model_of("flux"))["transformer"]
    assert found.keys() == {"transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_v"}
    query, value = found.values()
    assert torch.equal(query.down, down[:2])
    assert torch.equal(value.down, down[4:])
    assert query.alpha == value.alpha == 1.0
    torch.testing.assert_close(value.delta(), (up @ down)[2 * WIDTH :] * 0.5)


PAIR = ("lora_down.weight", "lora_up.weight")
REFUSED: dict[str, tuple[str, str, str, tuple[str, ...]]] = {
    "T5, kohya": ("flux", "kohya", "lora_te3_encoder_block_0_layer_0_SelfAttention_q", PAIR),
    "T5, OneTrainer": ("flux", "kohya", "lora_te2_encoder_block_0_layer_0_SelfAttention_q", PAIR),
    "T5, kohya, Stable Diffusion 3": ("sd3", "kohya", "lora_te3_encoder_block_0_layer_0_SelfAttention_q", PAIR),
    "T5, ComfyUI": ("flux", "comfyui", "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.q", PAIR),
    "a text encoder of a model that has none": (
        "chroma",
        "kohya",
        "lora_te1_text_model_encoder_layers_1_mlp_fc1",
        PAIR,
    ),
    "biases": ("flux", "comfyui", "diffusion_model.img_in", ("diff_b",)),
    "norms": ("flux", "comfyui", "diffusion_model.double_blocks.0.img_attn.norm.query_norm", ("diff",)),
    "a whole weight": ("flux", "comfyui", "diffusion_model.img_in", ("set_weight",)),
    "a part of linear1": ("flux", "comfyui", "diffusion_model.single_blocks.0.linear1_qkv", PAIR),
    "another's alias": ("flux2", "comfyui", "diffusion_model.sformer_blocks.0.attn.to_q", PAIR),
    "SDXL's": ("flux", "kohya", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q", PAIR),
    "FLUX.1's": ("flux2", "kohya", "lora_unet_double_blocks_0_img_mod_lin", PAIR),
    "FLUX.1's, OneTrainer": ("sd3", "kohya", "lora_transformer_single_transformer_blocks_0_proj_mlp", PAIR),
    "Lumina's": ("hidream", "comfyui", "diffusion_model.layers.0.attention.qkv", PAIR),
}


@pytest.mark.parametrize(("family", "form", "name", "ends"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_layers_is_refused_by_name(family, form, name, ends):
    shapes: dict[str, Any] = {"lora_down.weight": (2, 5), "lora_up.weight": (WIDTH, 2)}
    good = {"kohya": "lora_unet_final_layer_linear", "comfyui": "diffusion_model.final_layer.linear"}[form]
    tensors = {f"{good}.{end}": torch.randn(shapes[end]) for end in PAIR}
    tensors |= {f"{name}.{end}": torch.randn(shapes.get(end, (WIDTH,))) for end in ends}
    module = registry.load("lora.formats", form)
    assert format_of(tensors) == form
    with pytest.raises(ValueError, match=f"^{name}"):
        module.read(FileContent(tensors, {}), model_of(family))


def test_rows_that_cannot_be_three_layers_are_refused():
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{name}.lora_down.weight": torch.randn(2, 5), f"{name}.lora_up.weight": torch.randn(10, 2)}
    with pytest.raises(
        ValueError, match=r"^double_blocks\.0\.img_attn\.qkv: 10 rows cannot be those of 3 layers as 1:1:1$"
    ):
        registry.load("lora.formats", "kohya").read(FileContent(tensors, {}), model_of("flux"))
