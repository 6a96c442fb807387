"""The configurations that a single file does not have: of the shapes of its tensors, and of what its kind says."""

from __future__ import annotations

from typing import Any

from dreamlora.errors import UserError
from dreamlora.models.single_file.contents import Contents, Shapes
from dreamlora.models.single_file.kinds import UNET, VAE, ClipEncoder, ModelKind, Prediction

VOCABULARY = 49408
"""Tokens of CLIP."""
HEAD = 64
"""Channels of a head of attention, in all text encoders and newer UNets."""
LARGEST_SIDE = 10**6
_MOST = 100
"""Of layers and blocks in a row; all known models have fewer than 40."""


def unet_config(contents: Contents, kind: ModelKind, prediction: Prediction) -> dict[str, Any]:
    """For UNet2DConditionModel.

    Raises:
        UserError: the file lacks a tensor that tells something, or has more blocks than any model.
    """
    shapes = _Shapes(contents, UNET, "UNet")
    shapes.bound("input_blocks", "middle_block", "output_blocks")
    ends = [i for i in range(_MOST) if f"input_blocks.{i}.0.op.weight" in shapes.own]
    per_level = ends[0] if ends else 0
    if per_level < 2 or ends != [per_level * (level + 1) for level in range(len(ends))]:
        raise shapes.odd("its levels do not have the same number of layers each")
    firsts = [1 + per_level * level for level in range(len(ends) + 1)]
    widths = [shapes.side(f"input_blocks.{first}.0.in_layers.2.weight", 0) for first in firsts]
    depths = [shapes.count(f"input_blocks.{first}.1.transformer_blocks.{{}}.norm1.weight") for first in firsts]
    attended = [first for first, depth in zip(firsts, depths, strict=True) if depth]
    if not attended:
        raise shapes.odd("it has no attention to the text")
    block = f"input_blocks.{attended[0]}.1"
    config: dict[str, Any] = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": _latents(kind, prediction),
        "in_channels": shapes.side("input_blocks.0.0.weight", 1),
        "out_channels": shapes.side("out.2.weight", 0),
        "block_out_channels": widths,
        "layers_per_block": per_level - 1,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        "transformer_layers_per_block": [max(depth, 1) for depth in depths],
        "cross_attention_dim": shapes.side(f"{block}.transformer_blocks.0.attn2.to_k.weight", 1),
        "attention_head_dim": kind.heads or [max(width // HEAD, 1) for width in widths],  # heads, in spite of its name
        "use_linear_projection": len(shapes.shape(f"{block}.proj_in.weight")) == 2,
        **kind.unet,
    }
    if "addition_embed_type" in kind.unet:
        config["projection_class_embeddings_input_dim"] = shapes.side("label_emb.0.0.weight", 1)
    return config


def _latents(kind: ModelKind, prediction: Prediction) -> int:
    """Stable Diffusion 2 base, which predicts noise, was made for images as those of version 1."""
    return 64 if kind.latents == 96 and prediction.type == "epsilon" else kind.latents


def vae_config(contents: Contents, kind: ModelKind) -> dict[str, Any]:
    """For AutoencoderKL; raises as ``unet_config``."""
    shapes = _Shapes(contents, VAE, "autoencoder")
    levels = shapes.count("encoder.down.{}.block.0.conv1.weight")
    if not levels:
        raise shapes.odd("it has no levels (encoder.down...)")
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": shapes.side("encoder.conv_in.weight", 1),
        "out_channels": shapes.side("decoder.conv_out.weight", 0),
        "block_out_channels": [shapes.side(f"encoder.down.{level}.block.0.conv1.weight", 0) for level in range(levels)],
        "layers_per_block": shapes.count("encoder.down.0.block.{}.conv1.weight"),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "latent_channels": shapes.side("decoder.conv_in.weight", 1),
        "sample_size": kind.latents * 8,
        "scaling_factor": kind.scaling_factor,
        "use_quant_conv": "quant_conv.weight" in shapes.own,
        "use_post_quant_conv": "post_quant_conv.weight" in shapes.own,
    }


def text_config(contents: Contents, encoder: ClipEncoder) -> dict[str, Any]:
    """For CLIPTextModel, with or without projection; raises as ``unet_config``."""
    shapes = _Shapes(contents, encoder.prefix, encoder.name.replace("_", " "))
    names = _NAMES[encoder.layout]
    # some programs leave out transformers' own first word
    inner = "text_model." if encoder.layout == "clip" and f"text_model.{names['tokens']}" in shapes.own else ""
    tokens, width = (shapes.side(inner + names["tokens"], side) for side in (0, 1))
    if tokens < VOCABULARY:
        raise shapes.odd(f"it knows {tokens} tokens, and CLIP's tokenizer has {VOCABULARY}")
    projection = names["projection"] if encoder.class_name.endswith("WithProjection") else None
    return {
        "architectures": [encoder.class_name],
        "model_type": "clip_text_model",
        "vocab_size": tokens,
        "hidden_size": width,
        "intermediate_size": shapes.side(f"{inner}{names['layers'].format(0)}{names['wide']}", 0),
        "num_hidden_layers": min(shapes.count(f"{inner}{names['layers']}{names['wide']}"), encoder.most_layers),
        "num_attention_heads": max(width // HEAD, 1),
        "max_position_embeddings": shapes.side(inner + names["positions"], 0),
        "hidden_act": encoder.activation,
        "projection_dim": shapes.side(projection, 1) if projection else width,
        "bos_token_id": VOCABULARY - 2,
        "eos_token_id": VOCABULARY - 1,
        "pad_token_id": VOCABULARY - 1 if encoder.layout == "clip" else 0,
    }


_NAMES = {
    "clip": {
        "tokens": "embeddings.token_embedding.weight",
        "positions": "embeddings.position_embedding.weight",
        "layers": "encoder.layers.{}.",
        "wide": "mlp.fc1.weight",
        "projection": "text_projection.weight",
    },
    "open_clip": {
        "tokens": "token_embedding.weight",
        "positions": "positional_embedding",
        "layers": "transformer.resblocks.{}.",
        "wide": "mlp.c_fc.weight",
        "projection": "text_projection",
    },
}


def scheduler_config(kind: ModelKind, prediction: Prediction) -> dict[str, Any]:
    """Stable Diffusion's schedule, which all its descendants have."""
    zero = prediction.zero_terminal_snr
    return {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
        "timestep_spacing": "trailing" if zero else "leading",  # else the last step, noise alone, is never drawn from
        "prediction_type": prediction.type,
        "rescale_betas_zero_snr": zero,
        **kind.scheduler,
    }


class _Shapes:
    """The shapes of one part of a file.

    Args:
        contents: of the file.
        prefix: of the part's tensors.
        what: it is, for messages.
    """

    def __init__(self, contents: Contents, prefix: str, what: str) -> None:
        self.own: Shapes = contents.below(prefix)
        self._file, self._prefix, self._what = contents.file, prefix, what

    def odd(self, why: str) -> UserError:
        """The error that says so."""
        return UserError(f"{self._file}: its {self._what} is of no known kind: {why}")

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor that must be there."""
        if name not in self.own:
            raise UserError(
                f"{self._file} is incomplete or of no known kind: its {self._what} lacks {self._prefix}{name}"
            )
        return self.own[name]

    def side(self, name: str, side: int) -> int:
        """One side of a tensor; some that a model cannot have are told here, as configs are built of them."""
        shape = self.shape(name)
        if len(shape) <= side or not 0 < shape[side] <= LARGEST_SIDE:
            raise self.odd(f"{self._prefix}{name} has the shape {list(shape)}")
        return shape[side]

    def count(self, pattern: str) -> int:
        """How many tensors of numbered names there are, from 0."""
        found = next((i for i in range(_MOST) if pattern.format(i) not in self.own), _MOST)
        if found == _MOST:
            raise self.odd(f"it has {_MOST} or more of {self._prefix}{pattern.format('*')}")
        return found

    def bound(self, *groups: str) -> None:
        """Nothing, if none of these has more numbered members than any model: diffusers looks at each with each."""
        for group in groups:
            members = {name.split(".")[1] for name in self.own if name.startswith(f"{group}.")}
            if len(members) > _MOST:
                raise self.odd(f"it has {len(members)} {group}")
