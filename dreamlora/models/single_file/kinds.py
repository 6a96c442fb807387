"""Which kinds of single files are known, and by what a file is one of them. No torch here.

Of each kind the file has nearly all: the rest, which is the same for all models of the kind, stands here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dreamlora.archives import open_tensors
from dreamlora.errors import UserError
from dreamlora.models.single_file.contents import Contents
from dreamlora.models.single_file.others import other_kind

UNET = "model.diffusion_model."
VAE = "first_stage_model."
LATENT_CHANNELS = 4
_INPUTS = {9: "inpainting", 8: "edits by instructions", 5: "depth as input", 7: "upscaling"}
"""What more than four channels are for."""
_EDM = ("edm_mean", "edm_vpred.sigma_max")
_BASE_STEPS = 875_000
"""Of Stable Diffusion 2.0 and 2.1 base, which predict noise, while their larger descendants predict velocity."""

Layout = Literal["clip", "open_clip"]


@dataclass(frozen=True)
class ClipEncoder:
    """One text encoder.

    Attributes:
        name: of the part; its tokenizer's has the same ending.
        prefix: of its tensors.
        layout: as transformers names them, or as OpenCLIP does.
        class_name: of transformers.
        activation: in its layers.
        pad_token: of the tokenizer.
        most_layers: that are used; what comes behind is left out.
    """

    name: str
    prefix: str
    layout: Layout
    class_name: str = "CLIPTextModel"
    activation: str = "gelu"
    pad_token: str = "!"
    most_layers: int = 100

    @property
    def tokenizer(self) -> str:
        """The name of its tokenizer's part."""
        return self.name.replace("text_encoder", "tokenizer")


@dataclass(frozen=True)
class ModelKind:
    """A kind of models.

    Attributes:
        name: for a person.
        pipeline: class of diffusers.
        encoders: of text.
        heads: of the UNet's attention; None: as many as have 64 channels each.
        latents: along a side of the images that it was made for.
        scaling_factor: of the latents.
        scheduler: class of diffusers.
        settings: of model_index.json.
        unet: what else its UNet's config says.
    """

    name: str
    pipeline: str
    encoders: tuple[ClipEncoder, ...]
    heads: int | None
    latents: int
    scaling_factor: float
    scheduler: dict[str, Any]
    settings: dict[str, Any]
    unet: dict[str, Any]


_CLIP_L = {"layout": "clip", "activation": "quick_gelu", "pad_token": "<|endoftext|>"}
_NO_CHECKER = {"safety_checker": [None, None], "feature_extractor": [None, None], "requires_safety_checker": False}
_DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False}

STABLE_DIFFUSION_1 = ModelKind(
    name="Stable Diffusion 1.x",
    pipeline="StableDiffusionPipeline",
    encoders=(ClipEncoder("text_encoder", "cond_stage_model.transformer.", **_CLIP_L),),  # type: ignore[arg-type]
    heads=8,
    latents=64,
    scaling_factor=0.18215,
    scheduler=_DDIM,
    settings=_NO_CHECKER,
    unet={},
)
STABLE_DIFFUSION_2 = ModelKind(
    name="Stable Diffusion 2.x",
    pipeline="StableDiffusionPipeline",
    encoders=(ClipEncoder("text_encoder", "cond_stage_model.model.", "open_clip", most_layers=23),),
    heads=None,
    latents=96,
    scaling_factor=0.18215,
    scheduler=_DDIM,
    settings=_NO_CHECKER,
    unet={"upcast_attention": True},
)
STABLE_DIFFUSION_XL = ModelKind(
    name="Stable Diffusion XL",
    pipeline="StableDiffusionXLPipeline",
    encoders=(
        ClipEncoder("text_encoder", "conditioner.embedders.0.transformer.", **_CLIP_L),  # type: ignore[arg-type]
        ClipEncoder("text_encoder_2", "conditioner.embedders.1.model.", "open_clip", "CLIPTextModelWithProjection"),
    ),
    heads=None,
    latents=128,
    scaling_factor=0.13025,
    scheduler={"_class_name": "EulerDiscreteScheduler", "interpolation_type": "linear", "use_karras_sigmas": False},
    settings={"force_zeros_for_empty_prompt": True, "image_encoder": [None, None], "feature_extractor": [None, None]},
    unet={"addition_embed_type": "text_time", "addition_time_embed_dim": 256},
)
_REFINER = "conditioner.embedders.0.model."


@dataclass(frozen=True)
class Prediction:
    """What a model predicts.

    Attributes:
        type: epsilon or v_prediction.
        zero_terminal_snr: whether its last step is noise alone.
        note: for a person, where it had to be guessed.
    """

    type: str = "epsilon"
    zero_terminal_snr: bool = False
    note: str | None = None


def recognize(contents: Contents) -> ModelKind:
    """The kind of model that a file holds.

    Raises:
        UserError: it is none that is known, or not a whole one; the message says what it is, or lacks.
    """
    file, conv_in = contents.file, contents.shapes.get(f"{UNET}input_blocks.0.0.weight")
    if conv_in is None or contents.has("control_model."):
        raise UserError(f"{file} {other_kind(contents)}")
    if len(conv_in) != 4 or conv_in[1] != LATENT_CHANNELS:
        channels = conv_in[1] if len(conv_in) == 4 else 0
        wanted = f"has {channels} input channels{f', for {_INPUTS[channels]},' if channels in _INPUTS else ''}"
        raise UserError(
            f"{file}: the UNet {wanted} where {LATENT_CHANNELS} are expected: only models from text to image are "
            "trained; give the model that it was made from"
        )
    if contents.has(*_EDM):
        raise UserError(
            f"{file} was trained in another way than Stable Diffusion (EDM, as Playground v2.5: it has {_EDM[0]} or "
            f"{_EDM[1]}), which is not supported: give a model of Stable Diffusion XL"
        )
    kind = _by_text_encoder(contents)
    if not contents.has(VAE):
        raise UserError(
            f"{file} is a {kind.name} without its autoencoder ({VAE}...): give the whole model; some programs can put "
            "one into the file"
        )
    return kind


def _by_text_encoder(contents: Contents) -> ModelKind:
    file = contents.file
    if contents.has(_REFINER) and not contents.has("conditioner.embedders.1."):
        raise UserError(
            f"{file} is the refiner of Stable Diffusion XL, which draws only the last steps of another model's images: "
            "give the base model"
        )
    if contents.has("conditioner."):
        kind = STABLE_DIFFUSION_XL
    elif contents.has("cond_stage_model.model."):
        kind = STABLE_DIFFUSION_2
    else:
        kind = STABLE_DIFFUSION_1
    missing = [encoder for encoder in kind.encoders if not contents.has(encoder.prefix)]
    if missing:
        lacking = " and ".join(f"{encoder.prefix}..." for encoder in missing)
        raise UserError(
            f"{file} has the UNet of a Stable Diffusion without {'its' if len(missing) == 1 else 'both'} text "
            f"encoder{'' if len(missing) == 1 else 's'} ({lacking}): give the whole model, as one file or as a folder "
            "in diffusers' format"
        )
    return kind


def prediction_of(contents: Contents, kind: ModelKind) -> Prediction:
    """What the model predicts: as the file's marks say, else its metadata, else what is usual.

    Raises:
        UserError: see ``archives.open_tensors``.
    """
    if "v_pred" in contents.shapes:  # as NoobAI marks its files, and ComfyUI reads them
        return Prediction("v_prediction", "ztsnr" in contents.shapes)
    told = contents.metadata.get("modelspec.prediction_type", "").lower()
    if told in ("v", "v_prediction", "v-prediction"):
        return Prediction("v_prediction", "ztsnr" in contents.shapes)
    if told == "epsilon" or kind is not STABLE_DIFFUSION_2 or _steps(contents.file, contents) == _BASE_STEPS:
        return Prediction()
    return Prediction(
        "v_prediction",
        note=f"{contents.file}: a file of {kind.name} does not say what the model predicts. Velocity is taken, as for "
        "2.1 at 768 pixels; for a model made from 2.0 or 2.1 base give --prediction_type epsilon --resolution 512",
    )


def _steps(file: Path, contents: Contents) -> int | None:
    """The steps that a model was trained for, where the file keeps them."""
    if contents.shapes.get("global_step") not in ((), (1,)):
        return None
    with open_tensors(file, "np") as tensors:
        value = np.asarray(tensors.get_tensor("global_step")).reshape(-1)[0]
    return int(value) if np.isfinite(value) else None
