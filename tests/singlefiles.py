"""Small pipelines of the real classes, and single files of them as the models' authors have them: names and layouts are
those of CompVis' and Stability's code (ldm, sgm, OpenCLIP), written down here once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dreamlora.models.single_file import clip

WIDTH = 64
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TOP = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_OPEN_CLIP = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def pipeline(kind: str, tokenizers: Path, **scheduler: Any) -> Any:
    """A pipeline with random weights for 64 x 64 pixels.

    Args:
        kind: "1", "2" or "xl".
        tokenizers: folder for these.
        scheduler: settings of it that are others.
    """
    torch.manual_seed(0)
    return {"1": _first, "2": _second, "xl": _xl}[kind](tokenizers, scheduler)


def _first(tokenizers: Path, scheduler: dict[str, Any]) -> Any:
    unet = _unet((32, 32, 64, 64), attention_head_dim=8, cross_attention_dim=WIDTH)
    return _of_one_encoder(unet, _clip("quick_gelu"), _tokenizer(tokenizers, "<|endoftext|>"), scheduler)


def _second(tokenizers: Path, scheduler: dict[str, Any]) -> Any:
    unet = _unet(
        (64, 64, 128, 128),
        attention_head_dim=(1, 1, 2, 2),
        cross_attention_dim=WIDTH,
        use_linear_projection=True,
        upcast_attention=True,
    )
    return _of_one_encoder(
        unet,
        _clip("gelu", num_hidden_layers=23),
        _tokenizer(tokenizers, "!"),
        {"prediction_type": "v_prediction"} | scheduler,
    )


def _of_one_encoder(unet: Any, encoder: Any, tokenizer: Any, scheduler: dict[str, Any]) -> Any:
    return StableDiffusionPipeline(
        vae=_vae(0.18215),
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            clip_sample=False,
            set_alpha_to_one=False,
            **scheduler,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _xl(tokenizers: Path, scheduler: dict[str, Any]) -> Any:
    unet = _unet(
        (64, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        attention_head_dim=(1, 1, 2),
        cross_attention_dim=2 * WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + WIDTH,
    )
    return StableDiffusionXLPipeline(
        vae=_vae(0.13025),
        text_encoder=_clip("quick_gelu"),
        tokenizer=_tokenizer(tokenizers / "1", "<|endoftext|>"),
        text_encoder_2=_clip("gelu", CLIPTextModelWithProjection),
        tokenizer_2=_tokenizer(tokenizers / "2", "!"),
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            **{"timestep_spacing": "leading", **scheduler},
        ),
        add_watermarker=False,
    )


def _unet(widths: tuple[int, ...], **config: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(sample_size=8, block_out_channels=widths, layers_per_block=2, **config)


def _vae(scaling_factor: float) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(32, 32, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=2,
        scaling_factor=scaling_factor,
    )


def _clip(activation: str, encoder_class: Any = CLIPTextModel, **config: Any) -> Any:
    return encoder_class(
        CLIPTextConfig(
            **{
                "vocab_size": 49408,
                "hidden_size": WIDTH,
                "intermediate_size": WIDTH,
                "projection_dim": WIDTH,
                "num_hidden_layers": 2,
                "num_attention_heads": 1,
                "hidden_act": activation,
                "bos_token_id": 49406,
                "eos_token_id": 49407,
                **config,
            }
        )
    )


def _tokenizer(folder: Path, pad_token: str) -> Any:
    from transformers import CLIPTokenizer

    clip.write_tokenizer(folder, 77, pad_token)
    return CLIPTokenizer.from_pretrained(folder)


def original(source: Any) -> dict[str, Tensor]:
    """All tensors of a pipeline, as the file of such a model names and shapes them."""
    xl = hasattr(source, "text_encoder_2")
    tensors = {f"model.diffusion_model.{name}": own for name, own in original_unet(source.unet).items()}
    tensors |= {f"first_stage_model.{name}": own for name, own in original_vae(source.vae).items()}
    if xl:
        tensors |= _with(_bare_clip(source.text_encoder), "conditioner.embedders.0.transformer.text_model.")
        tensors |= _with(_open_clip(source.text_encoder_2), "conditioner.embedders.1.model.")
    elif source.text_encoder.config.hidden_act == "gelu":
        tensors |= _with(_open_clip(source.text_encoder, one_more=True), "cond_stage_model.model.")
    else:
        tensors |= _with(_bare_clip(source.text_encoder), "cond_stage_model.transformer.text_model.")
        tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return {name: own.contiguous().clone() for name, own in tensors.items()}


def save_original(source: Any, file: Path, metadata: Mapping[str, str] | None = None, **more: Tensor | None) -> Path:
    """Write the single file of a pipeline; ``more`` has further tensors, or None for those to be left out."""
    tensors: dict[str, Any] = {**original(source), **more}
    save_file({name: own for name, own in tensors.items() if own is not None}, file, dict(metadata or {}) or None)
    return file


def _with(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def original_unet(unet: Any) -> dict[str, Tensor]:
    """``ldm.modules.diffusionmodules.openaimodel.UNetModel``: blocks are numbered through all levels."""
    per_level, levels = unet.config.layers_per_block, len(unet.config.block_out_channels)
    places = {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"}
    places["mid_block.resnets.1"] = "middle_block.2"
    for level in range(levels):
        first = level * (per_level + 1)
        for layer in range(per_level):
            places[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{1 + first + layer}.0"
            places[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{1 + first + layer}.1"
        places[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{first + per_level + 1}.0.op"
        for layer in range(per_level + 1):
            places[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{first + layer}.0"
            places[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{first + layer}.1"
        behind = 2 if "CrossAttn" in unet.config.up_block_types[level] else 1
        places[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{first + per_level}.{behind}.conv"
    return {
        _moved(_moved(name, places | _TOP), _RESNET if ".resnets." in name else {}): own for name, own in _state(unet)
    }


def original_vae(vae: Any) -> dict[str, Tensor]:
    """``ldm.models.autoencoder.AutoencoderKL``: the decoder counts its levels from the last one, and attention is made
    of convolutions.
    """
    levels, per_level = len(vae.config.block_out_channels), vae.config.layers_per_block
    places = {}
    for side in ("encoder", "decoder"):
        places |= {f"{side}.mid_block.resnets.{i}": f"{side}.mid.block_{i + 1}" for i in range(2)}
        places |= {f"{side}.conv_norm_out": f"{side}.norm_out"}
        attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
        places |= {f"{side}.mid_block.attentions.0.{new}": f"{side}.mid.attn_1.{old}" for new, old in attention.items()}
    for level in range(levels):
        for layer in range(per_level + 1):
            places[f"encoder.down_blocks.{level}.resnets.{layer}"] = f"encoder.down.{level}.block.{layer}"
            places[f"decoder.up_blocks.{level}.resnets.{layer}"] = f"decoder.up.{levels - 1 - level}.block.{layer}"
        places[f"encoder.down_blocks.{level}.downsamplers.0"] = f"encoder.down.{level}.downsample"
        places[f"decoder.up_blocks.{level}.upsamplers.0"] = f"decoder.up.{levels - 1 - level}.upsample"
    tensors = {_moved(name, places).replace("conv_shortcut", "nin_shortcut"): own for name, own in _state(vae)}
    return {
        name: own[:, :, None, None] if ".attn_1." in name and own.ndim == 2 else own for name, own in tensors.items()
    }


def _bare_clip(encoder: Any) -> dict[str, Tensor]:
    return {name.removeprefix("text_model."): own for name, own in _state(encoder)}


def _open_clip(encoder: Any, one_more: bool = False) -> dict[str, Tensor]:
    """OpenCLIP's text tower: queries, keys and values in one matrix, the projection for vectors from the left.

    Args:
        encoder: of transformers.
        one_more: layer at the end, which Stable Diffusion 2 has and does not use.
    """
    state = _bare_clip(encoder)
    tensors = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "ln_final.weight": state["final_layer_norm.weight"],
        "ln_final.bias": state["final_layer_norm.bias"],
        "text_projection": state.get("text_projection.weight", torch.randn(WIDTH, WIDTH)).T,
        "logit_scale": torch.tensor(4.6),
    }
    layers = encoder.config.num_hidden_layers
    for layer in range(layers + one_more):
        own = f"encoder.layers.{min(layer, layers - 1)}."
        block = f"transformer.resblocks.{layer}."
        for kind in ("weight", "bias"):
            tensors |= {f"{block}{old}.{kind}": state[f"{own}{new}.{kind}"] for new, old in _OPEN_CLIP.items()}
            joined = torch.cat([state[f"{own}self_attn.{one}_proj.{kind}"] for one in "qkv"])
            tensors[f"{block}attn.in_proj_{kind}"] = joined
    return tensors


def _moved(name: str, places: Mapping[str, str]) -> str:
    """The name with one of its parts, between points, replaced."""
    for new, old in places.items():
        if f".{new}." in f".{name}.":
            return f".{name}.".replace(f".{new}.", f".{old}.", 1)[1:-1]
    return name


def _state(module: Any) -> list[tuple[str, Tensor]]:
    return list(module.state_dict().items())
