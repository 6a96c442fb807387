"""What a file is that is no whole model of a known kind, in words. No torch here, unless it may be a newer model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import SimpleNamespace

from dreamlora.errors import UserError
from dreamlora.models.single_file.contents import Contents

_LORA = re.compile(r"\.lora_|\.lora\.|^lora_|lora_(up|down|A|B)\b|\.hada_|\.lokr_|\.oft_|\.dora_scale|\.diff$")
_EMBEDDINGS = {"emb_params", "clip_l", "clip_g", "string_to_param", "<placeholder>"}
_AUTOENCODERS = ("first_stage_model.", "vae.", "")
"""What the names of an autoencoder's tensors begin with, in whole models and alone."""
_FOLDER = "give the whole model as a folder in diffusers' format, or its hub name"


def other_kind(contents: Contents) -> str:
    """A sentence without its subject, the file: what it is, and what to do."""
    return _addition(contents) or _part(contents) or _newer_model(contents) or _unknown(contents)


def _addition(contents: Contents) -> str | None:
    """For what belongs to a model and is none."""
    names = contents.shapes
    if any(_LORA.search(name) for name in names):
        return (
            "is a LoRA, not a model. Give the model that it belongs to here, and the LoRA to `dreamlora sample --lora` "
            "or `dreamlora evaluate --lora`"
        )
    if names.keys() <= _EMBEDDINGS:
        return "is an embedding of words (textual inversion), not a model: give the model that it belongs to"
    if contents.has("control_model.", "controlnet_", "control_", "input_hint_block."):
        return "is a ControlNet, not a model from text to image: give the model that it belongs to"
    if contents.has("ip_adapter.", "image_proj.", "adapter.body.", "body.0."):
        return "is an adapter for images, not a model: give the model that it belongs to"
    return None


def _part(contents: Contents) -> str | None:
    """For one part of a model."""
    names = contents.shapes
    if autoencoder_prefix(contents) is not None and not contents.has(
        "model.", "text_encoders.", "cond_stage_model.", "conditioner."
    ):
        return (
            "is an autoencoder alone: the denoiser and the text encoders are missing. Give a whole model here, and "
            "this file to --pretrained_vae_model_name_or_path"
        )
    if contents.has("text_model.", "encoder.block.", "transformer.resblocks.", "shared.", "model.embed_tokens."):
        return f"is a text encoder alone: the denoiser and the autoencoder are missing; {_FOLDER}"
    if "conv_in.weight" in names and contents.has("down_blocks."):
        return f"is a UNet alone: the text encoders and the autoencoder are missing; {_FOLDER}"
    return None


def autoencoder_prefix(contents: Contents) -> str | None:
    """What the names of the tensors of the autoencoder in a file begin with; None: there is none in it."""
    ends = ("encoder.conv_in.weight", "decoder.conv_in.weight")
    return next((prefix for prefix in _AUTOENCODERS if all(f"{prefix}{end}" in contents.shapes for end in ends)), None)


def check_autoencoder(contents: Contents) -> str:
    """The same where one is wanted, alone or in a whole model.

    Raises:
        UserError: there is none; the message says what the file holds.
    """
    prefix = autoencoder_prefix(contents)
    if prefix is None:
        raise UserError(
            f"{contents.file} has no autoencoder (encoder.conv_in.weight and decoder.conv_in.weight, alone or below "
            f"first_stage_model.): it holds {contents.outline()}. Give --pretrained_vae_model_name_or_path the file "
            "of one, or a folder in diffusers' format"
        )
    return prefix


def _newer_model(contents: Contents) -> str | None:
    """For a denoiser that diffusers knows, of a kind whose other parts are never, or not all, in one file."""
    from diffusers.loaders import single_file_utils as diffusers_files

    checkpoint = {name: SimpleNamespace(shape=shape, ndim=len(shape)) for name, shape in contents.shapes.items()}
    try:
        kind = diffusers_files.infer_diffusers_model_type(checkpoint)
    except Exception:  # of shapes that nobody has looked at
        return None
    if kind == "v1":  # what it says of all that it does not know
        return None
    known: Mapping[str, str] = diffusers_files.DIFFUSERS_DEFAULT_PIPELINE_PATHS.get(kind, {})
    name = known.get("pretrained_model_name_or_path", kind)
    whole = f"give a whole model as a folder in diffusers' format, or a hub name such as {name}"
    if contents.has("text_encoders.", "cond_stage_model.", "conditioner."):
        return (
            f"is a model such as {name} with its text encoders. Their tokenizers are in no such file, and this program "
            f"brings CLIP's alone: {whole}"
        )
    return f"holds the denoiser of a model such as {name}: its text encoders and autoencoder are missing; {whole}"


def _unknown(contents: Contents) -> str:
    return (
        "is no model that is known as a single file: no UNet of a Stable Diffusion (model.diffusion_model.input_blocks"
        f"...), text encoder and autoencoder. It holds {contents.outline()}; {_FOLDER}"
    )
