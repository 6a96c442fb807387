"""Stage `flow_export`: checkpoints -> float16 safetensors in the layout of a stock FluxPipeline."""

import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from transformers import CLIPTextModel, CLIPTokenizer

from dreamlora.tiny import pipeline_path
from pretraining import flow, flow_tokenizer
from pretraining.export import declare_float32, forget_origin, replace
from pretraining.optim import load_average


def build_pipeline(folder: Path) -> FluxPipeline:
    """The pipeline from the checkpoints in `folder`: `guidance` if there is one, else `flow`; float32."""
    stage = "guidance" if (folder / "guidance.pt").exists() else "flow"
    trained = load_average(flow.FlowDenoiser(), folder, stage)
    embedded = pipeline_path()
    vae = AutoencoderKL.from_pretrained(embedded, subfolder="vae", torch_dtype=torch.float32)
    vae.register_to_config(shift_factor=0.0)  # FluxPipeline subtracts it
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),  # FLUX.1-dev's
        vae=vae,
        text_encoder=CLIPTextModel.from_pretrained(embedded, subfolder="text_encoder", torch_dtype=torch.float32),
        tokenizer=CLIPTokenizer.from_pretrained(embedded, subfolder="tokenizer"),
        text_encoder_2=trained.t5,
        tokenizer_2=flow_tokenizer.build(),
        transformer=trained.transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def export_pipeline(folder: Path, target: Path) -> None:
    """Write the pipeline as float16, replacing `target` in one rename."""
    pipeline = build_pipeline(folder)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        fresh = Path(scratch) / "pipeline"
        pipeline.to(torch.float16).save_pretrained(fresh, safe_serialization=True)
        for encoder in ("text_encoder", "text_encoder_2"):
            declare_float32(fresh / encoder / "config.json")
        forget_origin(fresh / "vae" / "config.json")
        replace(fresh, target)
