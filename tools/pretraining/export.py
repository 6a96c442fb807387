"""Stage `export`: checkpoints -> float16 safetensors in the layout of a stock diffusers pipeline."""

import json
import shutil
import tempfile
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPImageProcessorPil

from dreamlora.tiny import world
from pretraining import autoencoder, clip, denoiser, tokenizer
from pretraining.optim import load_average

PIXEL_MEAN = PIXEL_STD = (0.5, 0.5, 0.5)  # the small CLIP reads the range [-1, 1]


def build_pipeline(folder: Path) -> StableDiffusionPipeline:
    """The text-to-image pipeline from the checkpoints in `folder`, float32."""
    words = tokenizer.build()
    refined = (folder / "refined.pt").exists()
    trained = load_average(denoiser.Denoiser(words), folder, "unet")
    pipeline = StableDiffusionPipeline(
        vae=load_average(autoencoder.build(), folder, "refined") if refined else autoencoder.load_standardised(folder),
        text_encoder=trained.text_encoder,
        tokenizer=words,
        unet=trained.unet,
        scheduler=denoiser.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def export_pipeline(folder: Path, target: Path) -> None:
    """Write the pipeline as float16, replacing `target` in one rename."""
    pipeline = build_pipeline(folder)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        fresh = Path(scratch) / "pipeline"
        pipeline.to(torch.float16).save_pretrained(fresh, safe_serialization=True)
        declare_float32(fresh / "text_encoder" / "config.json")
        replace(fresh, target)


def export_clip(folder: Path, target: Path) -> None:
    """Write the CLIP model, its tokenizer and its image processor as float16, replacing `target` in one rename."""
    words = tokenizer.build()
    model = load_average(clip.build(words), folder, "clip")
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        fresh = Path(scratch) / "clip"
        model.half().save_pretrained(fresh, safe_serialization=True)  # type: ignore[operator]
        words.save_pretrained(fresh)
        CLIPImageProcessorPil(
            size={"shortest_edge": world.SIZE},
            crop_size={"height": world.SIZE, "width": world.SIZE},
            image_mean=list(PIXEL_MEAN),
            image_std=list(PIXEL_STD),
        ).save_pretrained(fresh)
        declare_float32(fresh / "config.json")
        replace(fresh, target)


def declare_float32(config: Path) -> None:
    """Make transformers load the float16 file as float32: "auto" would leave it half and clash with the UNet."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    for part in (settings, settings.get("text_config"), settings.get("vision_config")):
        if part is not None:
            part["dtype"] = "float32"
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def forget_origin(config: Path) -> None:
    """Take out where the part was loaded from: a place on this machine."""
    settings = json.loads(config.read_text(encoding="utf-8"))
    del settings["_name_or_path"]
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def replace(fresh: Path, target: Path) -> None:
    """Put `fresh` where `target` is."""
    old = target.with_name(target.name + ".old")
    if target.exists():
        target.rename(old)
    fresh.rename(target)
    shutil.rmtree(old, ignore_errors=True)
