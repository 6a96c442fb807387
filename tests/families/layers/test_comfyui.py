"""What is written, under the names and rows that ComfyUI has for each of diffusers' layers.

A line is a layer of diffusers', the weight of ComfyUI's model that it is in, and, where it is a part of it, the first
of its rows and their number, in widths of the model; "swapped": both halves of the rows change places.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from dreamlora import registry
from dreamlora.lora.formats import FileContent
from dreamlora.lora.names import ModelNames
from dreamlora.lora.weights import LayerWeights, lora_weights, product_of

WIDTH = 4

FLUX_BLOCKS = """
transformer_blocks.{}.attn.to_q              double_blocks.{}.img_attn.qkv   0 1
transformer_blocks.{}.attn.to_k              double_blocks.{}.img_attn.qkv   1 1
transformer_blocks.{}.attn.to_v              double_blocks.{}.img_attn.qkv   2 1
transformer_blocks.{}.attn.add_q_proj        double_blocks.{}.txt_attn.qkv   0 1
transformer_blocks.{}.attn.add_k_proj        double_blocks.{}.txt_attn.qkv   1 1
transformer_blocks.{}.attn.add_v_proj        double_blocks.{}.txt_attn.qkv   2 1
transformer_blocks.{}.attn.to_out.0          double_blocks.{}.img_attn.proj
transformer_blocks.{}.attn.to_add_out        double_blocks.{}.txt_attn.proj
"""
FLUX_MLPS = """
transformer_blocks.{}.ff.net.0.proj          double_blocks.{}.img_mlp.0
transformer_blocks.{}.ff.net.2               double_blocks.{}.img_mlp.2
transformer_blocks.{}.ff_context.net.0.proj  double_blocks.{}.txt_mlp.0
transformer_blocks.{}.ff_context.net.2       double_blocks.{}.txt_mlp.2
single_transformer_blocks.{}.attn.to_q       single_blocks.{}.linear1        0 1
single_transformer_blocks.{}.attn.to_k       single_blocks.{}.linear1        1 1
single_transformer_blocks.{}.attn.to_v       single_blocks.{}.linear1        2 1
single_transformer_blocks.{}.proj_mlp        single_blocks.{}.linear1        3 4
single_transformer_blocks.{}.proj_out        single_blocks.{}.linear2
"""
FLUX_ENDS = """
x_embedder                                   img_in
context_embedder                             txt_in
proj_out                                     final_layer.linear
"""
TABLES = {
    # utils.flux_to_diffusers
    "flux": FLUX_BLOCKS
    + FLUX_MLPS
    + FLUX_ENDS
    + """
transformer_blocks.{}.norm1.linear           double_blocks.{}.img_mod.lin
transformer_blocks.{}.norm1_context.linear   double_blocks.{}.txt_mod.lin
single_transformer_blocks.{}.norm.linear     single_blocks.{}.modulation.lin
time_text_embed.timestep_embedder.linear_1   time_in.in_layer
time_text_embed.timestep_embedder.linear_2   time_in.out_layer
time_text_embed.text_embedder.linear_1       vector_in.in_layer
time_text_embed.text_embedder.linear_2       vector_in.out_layer
time_text_embed.guidance_embedder.linear_1   guidance_in.in_layer
time_text_embed.guidance_embedder.linear_2   guidance_in.out_layer
norm_out.linear                              final_layer.adaLN_modulation.1  swapped
""",
    # the same: model_base.Chroma is a model_base.Flux
    "chroma": FLUX_BLOCKS + FLUX_MLPS + FLUX_ENDS,
    # the same
    "flux2": FLUX_BLOCKS
    + FLUX_ENDS
    + """
transformer_blocks.{}.ff.linear_in           double_blocks.{}.img_mlp.0
transformer_blocks.{}.ff.linear_out          double_blocks.{}.img_mlp.2
transformer_blocks.{}.ff_context.linear_in   double_blocks.{}.txt_mlp.0
transformer_blocks.{}.ff_context.linear_out  double_blocks.{}.txt_mlp.2
single_transformer_blocks.{}.attn.to_qkv_mlp_proj  single_blocks.{}.linear1
single_transformer_blocks.{}.attn.to_out     single_blocks.{}.linear2
norm_out.linear                              final_layer.adaLN_modulation.1  swapped
""",
    # utils.mmdit_to_diffusers
    "sd3": """
transformer_blocks.{}.attn.to_q              joint_blocks.{}.x_block.attn.qkv        0 1
transformer_blocks.{}.attn.to_k              joint_blocks.{}.x_block.attn.qkv        1 1
transformer_blocks.{}.attn.to_v              joint_blocks.{}.x_block.attn.qkv        2 1
transformer_blocks.{}.attn.add_q_proj        joint_blocks.{}.context_block.attn.qkv  0 1
transformer_blocks.{}.attn.add_k_proj        joint_blocks.{}.context_block.attn.qkv  1 1
transformer_blocks.{}.attn.add_v_proj        joint_blocks.{}.context_block.attn.qkv  2 1
transformer_blocks.{}.attn2.to_q             joint_blocks.{}.x_block.attn2.qkv       0 1
transformer_blocks.{}.attn2.to_k             joint_blocks.{}.x_block.attn2.qkv       1 1
transformer_blocks.{}.attn2.to_v             joint_blocks.{}.x_block.attn2.qkv       2 1
transformer_blocks.{}.attn2.to_out.0         joint_blocks.{}.x_block.attn2.proj
transformer_blocks.{}.attn.to_out.0          joint_blocks.{}.x_block.attn.proj
transformer_blocks.0.attn.to_add_out         joint_blocks.0.context_block.attn.proj
transformer_blocks.{}.norm1.linear           joint_blocks.{}.x_block.adaLN_modulation.1
transformer_blocks.0.norm1_context.linear    joint_blocks.0.context_block.adaLN_modulation.1
transformer_blocks.1.norm1_context.linear    joint_blocks.1.context_block.adaLN_modulation.1  swapped
transformer_blocks.{}.ff.net.0.proj          joint_blocks.{}.x_block.mlp.fc1
transformer_blocks.{}.ff.net.2               joint_blocks.{}.x_block.mlp.fc2
transformer_blocks.0.ff_context.net.0.proj   joint_blocks.0.context_block.mlp.fc1
transformer_blocks.0.ff_context.net.2        joint_blocks.0.context_block.mlp.fc2
context_embedder                             context_embedder
time_text_embed.timestep_embedder.linear_1   t_embedder.mlp.0
time_text_embed.timestep_embedder.linear_2   t_embedder.mlp.2
time_text_embed.text_embedder.linear_1       y_embedder.mlp.0
time_text_embed.text_embedder.linear_2       y_embedder.mlp.2
pos_embed.proj                               x_embedder.proj
norm_out.linear                              final_layer.adaLN_modulation.1  swapped
proj_out                                     final_layer.linear
""",
    # utils.auraflow_to_diffusers
    "auraflow": """
joint_transformer_blocks.{}.attn.to_q                  double_layers.{}.attn.w2q
joint_transformer_blocks.{}.attn.to_k                  double_layers.{}.attn.w2k
joint_transformer_blocks.{}.attn.to_v                  double_layers.{}.attn.w2v
joint_transformer_blocks.{}.attn.to_out.0              double_layers.{}.attn.w2o
joint_transformer_blocks.{}.attn.add_q_proj            double_layers.{}.attn.w1q
joint_transformer_blocks.{}.attn.add_k_proj            double_layers.{}.attn.w1k
joint_transformer_blocks.{}.attn.add_v_proj            double_layers.{}.attn.w1v
joint_transformer_blocks.{}.attn.to_add_out            double_layers.{}.attn.w1o
joint_transformer_blocks.{}.ff.linear_1                double_layers.{}.mlpX.c_fc1
joint_transformer_blocks.{}.ff.linear_2                double_layers.{}.mlpX.c_fc2
joint_transformer_blocks.{}.ff.out_projection          double_layers.{}.mlpX.c_proj
joint_transformer_blocks.{}.ff_context.linear_1        double_layers.{}.mlpC.c_fc1
joint_transformer_blocks.{}.ff_context.linear_2        double_layers.{}.mlpC.c_fc2
joint_transformer_blocks.{}.ff_context.out_projection  double_layers.{}.mlpC.c_proj
joint_transformer_blocks.{}.norm1.linear               double_layers.{}.modX.1
joint_transformer_blocks.{}.norm1_context.linear       double_layers.{}.modC.1
single_transformer_blocks.{}.attn.to_q                 single_layers.{}.attn.w1q
single_transformer_blocks.{}.attn.to_k                 single_layers.{}.attn.w1k
single_transformer_blocks.{}.attn.to_v                 single_layers.{}.attn.w1v
single_transformer_blocks.{}.attn.to_out.0             single_layers.{}.attn.w1o
single_transformer_blocks.{}.norm1.linear              single_layers.{}.modCX.1
single_transformer_blocks.{}.ff.linear_1               single_layers.{}.mlp.c_fc1
single_transformer_blocks.{}.ff.linear_2               single_layers.{}.mlp.c_fc2
single_transformer_blocks.{}.ff.out_projection         single_layers.{}.mlp.c_proj
time_step_proj.linear_1                                t_embedder.mlp.0
time_step_proj.linear_2                                t_embedder.mlp.2
context_embedder                                       cond_seq_linear
pos_embed.proj                                         init_x_linear
proj_out                                               final_linear
norm_out.linear                                        modF.1  swapped
""",
    # lora.model_lora_keys_unet: names that it has in common with diffusers
    "hidream": "\n".join(
        f"{name} {name}"
        for name in (
            *(f"double_stream_blocks.{{}}.block.attn1.{part}" for part in ("to_q", "to_k_t", "to_out", "to_out_t")),
            *("double_stream_blocks.{}.block.ff_i.experts.3.w2", "double_stream_blocks.{}.block.ff_t.w3"),
            *("single_stream_blocks.{}.block.ff_i.shared_experts.w1", "single_stream_blocks.{}.block.attn1.to_v"),
            *("single_stream_blocks.{}.block.adaLN_modulation.1", "caption_projection.48.linear"),
            *("final_layer.adaLN_modulation.1", "x_embedder.proj", "p_embedder.pooled_embedder.linear_2"),
        )
    ),
    # utils.z_image_to_diffusers
    "z_image": "\n".join(
        f"""
{block}.attention.to_q                  {block}.attention.qkv  0 1
{block}.attention.to_k                  {block}.attention.qkv  1 1
{block}.attention.to_v                  {block}.attention.qkv  2 1
{block}.attention.to_out.0              {block}.attention.out
{block}.feed_forward.w1                 {block}.feed_forward.w1
{block}.feed_forward.w2                 {block}.feed_forward.w2
{block}.feed_forward.w3                 {block}.feed_forward.w3
"""
        for block in ("layers.{}", "context_refiner.{}", "noise_refiner.{}")
    )
    + """
layers.{}.adaLN_modulation.0            layers.{}.adaLN_modulation.0
noise_refiner.{}.adaLN_modulation.0     noise_refiner.{}.adaLN_modulation.0
all_final_layer.2-1.linear              final_layer.linear
all_final_layer.2-1.adaLN_modulation.1  final_layer.adaLN_modulation.1
all_x_embedder.2-1                      x_embedder
cap_embedder.1                          cap_embedder.1
t_embedder.mlp.0                        t_embedder.mlp.0
t_embedder.mlp.2                        t_embedder.mlp.2
""",
    # ldm/lumina/model.py: names of the layers, and the order and heads of q, k and v
    "lumina2": "\n".join(
        f"""
{block}.attn.to_q                       {block}.attention.qkv  0 3
{block}.attn.to_k                       {block}.attention.qkv  3 1
{block}.attn.to_v                       {block}.attention.qkv  4 1
{block}.attn.to_out.0                   {block}.attention.out
{block}.feed_forward.linear_1           {block}.feed_forward.w1
{block}.feed_forward.linear_2           {block}.feed_forward.w2
{block}.feed_forward.linear_3           {block}.feed_forward.w3
"""
        for block in ("layers.{}", "context_refiner.{}", "noise_refiner.{}")
    )
    + """
layers.{}.norm1.linear                         layers.{}.adaLN_modulation.1
noise_refiner.{}.norm1.linear                  noise_refiner.{}.adaLN_modulation.1
norm_out.linear_1                              final_layer.adaLN_modulation.1
norm_out.linear_2                              final_layer.linear
x_embedder                                     x_embedder
time_caption_embed.caption_embedder.1          cap_embedder.1
time_caption_embed.timestep_embedder.linear_1  t_embedder.mlp.0
time_caption_embed.timestep_embedder.linear_2  t_embedder.mlp.2
""",
    # lora.model_lora_keys_unet: names that it has in common with diffusers
    "qwen_image": "\n".join(
        f"{name} {name}"
        for name in (
            *(f"transformer_blocks.{{}}.attn.{part}" for part in ("to_q", "to_out.0", "add_k_proj", "to_add_out")),
            *("transformer_blocks.{}.img_mlp.net.0.proj", "transformer_blocks.{}.txt_mlp.net.2"),
            *("transformer_blocks.{}.img_mod.1", "transformer_blocks.{}.txt_mod.1", "img_in", "txt_in", "proj_out"),
            *("norm_out.linear", "time_text_embed.timestep_embedder.linear_1"),
        )
    ),
    # utils.krea2_to_diffusers
    "krea2": "\n".join(
        f"""
{block}.attn.to_q       {original}.attn.wq
{block}.attn.to_k       {original}.attn.wk
{block}.attn.to_v       {original}.attn.wv
{block}.attn.to_gate    {original}.attn.gate
{block}.attn.to_out.0   {original}.attn.wo
{block}.ff.gate         {original}.mlp.gate
{block}.ff.up           {original}.mlp.up
{block}.ff.down         {original}.mlp.down
"""
        for block, original in (
            ("transformer_blocks.{}", "blocks.{}"),
            ("text_fusion.layerwise_blocks.{}", "txtfusion.layerwise_blocks.{}"),
            ("text_fusion.refiner_blocks.{}", "txtfusion.refiner_blocks.{}"),
        )
    )
    + """
img_in                  first
time_embed.linear_1     tmlp.0
time_embed.linear_2     tmlp.2
time_mod_proj           tproj.1
txt_in.linear_1         txtmlp.1
txt_in.linear_2         txtmlp.3
text_fusion.projector   txtfusion.projector
final_layer.linear      last.linear
""",
}
"""Source: ComfyUI's ``comfy/utils.py`` and ``comfy/lora.py``."""

CONFIGS = {"lumina2": {"num_attention_heads": 3, "num_kv_heads": 1}}


class Line(NamedTuple):
    layer: str
    weight: str
    first: int
    count: int
    whole: bool
    swapped: bool


def lines(table: str) -> Iterator[Line]:
    for line in table.strip().splitlines():
        for number in "01" if "{}" in line else "0":
            words = line.replace("{}", number).split()
            if words:
                layer, weight, *rest = words
                whole = not rest or rest == ["swapped"]
                first, count = (0, 2) if whole else map(int, rest)
                yield Line(layer, weight, first, count, whole, rest == ["swapped"])


def drawn(table: str) -> dict[str, LayerWeights]:
    draw, found = torch.Generator().manual_seed(0), {}
    for line in lines(table):
        rank = 1 + len(found) % 3
        down = torch.randn(rank, WIDTH, generator=draw)
        up = torch.randn(line.count * WIDTH, rank, generator=draw)
        found[line.layer] = lora_weights(down, up, alpha=0.5 + len(found) % 2)
    return found


def added(table: str, weights: dict[str, LayerWeights]) -> dict[str, Tensor]:
    """What ComfyUI adds to its weights, for a LoRA of diffusers' layers."""
    height: dict[str, int] = {}
    for line in lines(table):
        height[line.weight] = max(height.get(line.weight, 0), (line.first + line.count) * WIDTH)
    result = {weight: torch.zeros(rows, WIDTH) for weight, rows in height.items()}
    for line in lines(table):
        delta = weights[line.layer].delta()
        first = line.first * WIDTH
        result[line.weight][first : first + len(delta)] = torch.cat(delta.chunk(2)[::-1]) if line.swapped else delta
    return result


def names_of(family: str) -> ModelNames:
    model: ModelNames = registry.load("families.layers", family).names(CONFIGS.get(family, {"num_layers": 2}))
    return model


@pytest.mark.parametrize("family", TABLES)
def test_comfyui_finds_each_row_in_its_place(family):
    model, weights = names_of(family), drawn(TABLES[family])
    tensors = registry.load("lora.formats", "comfyui").write({model.denoiser: weights}, model).tensors
    expected = added(TABLES[family], weights)
    assert {name.partition(".lora_")[0] for name in tensors} == {f"diffusion_model.{name}" for name in expected}
    for name, delta in expected.items():
        down, up = (tensors[f"diffusion_model.{name}.lora_{factor}.weight"] for factor in "AB")
        torch.testing.assert_close(product_of(up, down), delta, msg=name)


@pytest.mark.parametrize("family", TABLES)
def test_comfyui_finds_the_same_in_kohyas_files(family):
    model, weights = names_of(family), drawn(TABLES[family])
    tensors = registry.load("lora.formats", "kohya").write({model.denoiser: weights}, model).tensors
    expected = added(TABLES[family], weights)
    assert len(tensors) == 3 * len(expected)
    for name, delta in expected.items():
        key = f"lora_unet_{name.replace('.', '_')}"
        down, up, alpha = (tensors[f"{key}.{end}"] for end in ("lora_down.weight", "lora_up.weight", "alpha"))
        torch.testing.assert_close(up @ down * (alpha / len(down)), delta, msg=name)


@pytest.mark.parametrize("family", TABLES)
def test_a_layer_alone_is_found_among_the_rows_of_others(family):
    """Of a part alone the other rows are zeros, and no adapter of theirs is read."""
    model, weights = names_of(family), drawn(TABLES[family])
    comfyui = registry.load("lora.formats", "comfyui")
    for line in lines(TABLES[family]):
        alone = {line.layer: weights[line.layer]}
        content = comfyui.write({model.denoiser: alone}, model)
        up = content.tensors[f"diffusion_model.{line.weight}.lora_B.weight"]
        others = {other.layer for other in lines(TABLES[family]) if other.weight == line.weight} - {line.layer}
        assert up.flatten(1).any(dim=1).sum() == line.count * WIDTH, line
        assert len(up) >= (1 + len(others)) * WIDTH, line
        found = comfyui.read(FileContent(content.tensors, {}), model)[model.denoiser]
        assert found.keys() == {line.layer}
        torch.testing.assert_close(found[line.layer].delta(), weights[line.layer].delta(), msg=line.layer)


TEXT = {
    # lora.model_lora_keys_clip
    "flux": {("text_encoder", "encoder.layers.0.mlp.fc1"): "text_encoder.text_model.encoder.layers.0.mlp.fc1"},
    "sd3": {
        ("text_encoder", "encoder.layers.0.mlp.fc1"): "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        ("text_encoder", "text_projection"): "text_encoders.clip_l.transformer.text_projection",
        ("text_encoder_2", "encoder.layers.3.self_attn.out_proj"): (
            "text_encoder_2.text_model.encoder.layers.3.self_attn.out_proj"
        ),
        ("text_encoder_2", "text_projection"): "text_encoders.clip_g.transformer.text_projection",
    },
    "sdxl": {("text_encoder_2", "text_projection"): "text_encoders.clip_g.transformer.text_projection"},
}


@pytest.mark.parametrize("family", TEXT)
def test_comfyui_finds_each_layer_of_a_text_encoder(family):
    comfyui, model = registry.load("lora.formats", "comfyui"), names_of(family)
    for (component, layer), name in TEXT[family].items():
        weights = {component: {layer: lora_weights(torch.ones(1, 2), torch.ones(2, 1))}}
        content = comfyui.write(weights, model)
        assert {key.partition(".lora_")[0] for key in content.tensors} == {name}
        assert comfyui.read(content, model).keys() == {component}
        assert comfyui.read(content, model)[component].keys() == {layer}
