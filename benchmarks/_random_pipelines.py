"""Folders of pipelines of the real architectures with random weights in bf16, which every program loads as it would the
real ones; nothing is downloaded.

    python benchmarks/_random_pipelines.py /dev/shm/models sdxl klein --device cuda
    python benchmarks/_random_pipelines.py /tmp/hollow flux --hollow

Denoiser and autoencoder are of full size, and drawn on the device. Text encoders have one layer, with outputs of the
real size, and tokenizers one token per letter: they are no part of a step, and loading them no part of the question.
--tiny makes everything small; --hollow writes files of the real size without numbers, which take no room on the disk:
for what reads their headers alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _cli
import diffusers
import torch
import transformers
from _gpu_cases import is_written
from _unets import SD15, SDXL, random_model

sys.path.insert(1, str(Path(__file__).parents[1]))
from tests.tinymodels.chat import qwen_tokenizer
from tests.tinymodels.parts import clip_tokenizer, t5_tokenizer, write_holes

CLIP_LENGTH = 77
TINY_UNET: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 8,
}
TINY_TRANSFORMER: dict[str, Any] = {
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
}
KL_BLOCKS = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4


@dataclass(frozen=True)
class Maker:
    """Makes the parts of one pipeline."""

    device: str
    tiny: bool

    def denoiser(self, kind: Any, config: dict[str, Any], tiny: dict[str, Any]) -> Any:
        """Of a class of diffusers; ``tiny`` is what is otherwise in a small one."""
        return random_model(kind, {**config, **(tiny if self.tiny else {})}, self.device, torch.bfloat16)

    def vae(self, kind: Any, channels: int, **config: Any) -> Any:
        """Eight pixels of a side are one latent."""
        down, up = KL_BLOCKS
        widths, groups = ((8, 8, 8, 8), 4) if self.tiny else ((128, 256, 512, 512), 32)
        blocks = {"block_out_channels": widths, "norm_num_groups": groups, "layers_per_block": 1 if self.tiny else 2}
        names = {"down_block_types": down, "up_block_types": up, "latent_channels": channels}
        return random_model(kind, {**names, **blocks, **config}, self.device, torch.bfloat16)

    def clip(self, tokenizer: Any, real: int, *, projection: bool = False) -> Any:
        """CLIP's text encoder with outputs of ``real`` channels."""
        width = self.width(real)
        config = transformers.CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=1,
            num_attention_heads=max(1, width // 64),
            max_position_embeddings=CLIP_LENGTH,
            projection_dim=width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
        return kind(config).bfloat16()

    def t5(self, tokenizer: Any) -> Any:
        """T5-XXL's encoder, but for its depth."""
        width = self.width(4096)
        config = transformers.T5Config(
            vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=width, num_layers=1, num_heads=2
        )
        return transformers.T5EncoderModel(config).bfloat16()

    def qwen3(self, tokenizer: Any) -> Any:
        """Qwen3-4B, but for its depth."""
        width = self.width(2560)
        config = transformers.Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=4096,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        return transformers.Qwen3ForCausalLM(config).bfloat16()

    def width(self, real: int) -> int:
        """Channels of an encoder that really has so many."""
        return real // 64 if self.tiny else real


def sd15(make: Maker) -> Any:
    """Stable Diffusion 1.5."""
    tokenizer = clip_tokenizer(CLIP_LENGTH)
    scheduler = diffusers.PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, skip_prk_steps=True
    )
    return diffusers.StableDiffusionPipeline(
        vae=make.vae(diffusers.AutoencoderKL, 4, sample_size=512),
        text_encoder=make.clip(tokenizer, 768),
        tokenizer=tokenizer,
        unet=make.denoiser(
            diffusers.UNet2DConditionModel,
            SD15,
            {**TINY_UNET, "cross_attention_dim": make.width(768), "attention_head_dim": 4},
        ),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(make: Maker) -> Any:
    """SDXL's base model."""
    tokenizer = clip_tokenizer(CLIP_LENGTH)
    tiny = {
        **TINY_UNET,
        "attention_head_dim": 4,
        "transformer_layers_per_block": 1,
        "cross_attention_dim": make.width(768) + make.width(1280),
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + make.width(1280),
    }
    return diffusers.StableDiffusionXLPipeline(
        vae=make.vae(diffusers.AutoencoderKL, 4, sample_size=1024, scaling_factor=0.13025, force_upcast=True),
        text_encoder=make.clip(tokenizer, 768),
        text_encoder_2=make.clip(tokenizer, 1280, projection=True),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=make.denoiser(diffusers.UNet2DConditionModel, SDXL, tiny),
        scheduler=diffusers.EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        ),
        add_watermarker=False,
    )


def flux(make: Maker) -> Any:
    """FLUX.1 [dev], 11.9 G parameters: what diffusers' transformer is unless it is told otherwise, with guidance."""
    tokenizer, tokenizer_2 = clip_tokenizer(CLIP_LENGTH), t5_tokenizer()
    tiny = {
        **TINY_TRANSFORMER,
        "axes_dims_rope": (4, 4, 8),
        "joint_attention_dim": make.width(4096),
        "pooled_projection_dim": make.width(768),
    }
    vae = {"scaling_factor": 0.3611, "shift_factor": 0.1159, "use_quant_conv": False, "use_post_quant_conv": False}
    return diffusers.FluxPipeline(
        scheduler=_flow(),
        vae=make.vae(diffusers.AutoencoderKL, 16, **vae),
        text_encoder=make.clip(tokenizer, 768),
        tokenizer=tokenizer,
        text_encoder_2=make.t5(tokenizer_2),
        tokenizer_2=tokenizer_2,
        transformer=make.denoiser(diffusers.FluxTransformer2DModel, {"guidance_embeds": True}, tiny),
    )


def klein(make: Maker) -> Any:
    """FLUX.2 [klein] base 4B, 3.9 G parameters."""
    tokenizer = qwen_tokenizer()
    config = {
        "in_channels": 128,
        "num_layers": 5,
        "num_single_layers": 20,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 3 * make.width(2560),
        "guidance_embeds": False,
    }
    tiny = {**TINY_TRANSFORMER, "axes_dims_rope": (4, 4, 4, 4)}
    return diffusers.Flux2KleinPipeline(
        scheduler=_flow(),
        vae=make.vae(diffusers.AutoencoderKLFlux2, 32),
        text_encoder=make.qwen3(tokenizer),
        tokenizer=tokenizer,
        transformer=make.denoiser(diffusers.Flux2Transformer2DModel, config, tiny),
        is_distilled=False,
    )


def _flow() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


PIPELINES: dict[str, Callable[[Maker], Any]] = {"sd15": sd15, "sdxl": sdxl, "klein": klein, "flux": flux}


def save_hollow(pipeline: Any, folder: Path) -> None:
    """A pipeline of modules without numbers."""
    for name, part in pipeline.components.items():
        if isinstance(part, torch.nn.Module):
            own = isinstance(part, diffusers.ModelMixin)
            (part.save_config if own else part.config.save_pretrained)(folder / name)
            file = "diffusion_pytorch_model.safetensors" if own else "model.safetensors"
            write_holes(part.state_dict(), folder / name / file)
        elif part is not None:
            part.save_pretrained(folder / name)
    pipeline.save_config(folder)


def main() -> None:
    """Write what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="+", choices=PIPELINES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--hollow", action="store_true")
    options = parser.parse_args()
    for name in options.names:
        started = time.perf_counter()
        folder = options.folder / name
        if is_written(folder):
            continue
        if options.hollow:
            save_hollow(PIPELINES[name](Maker("meta", options.tiny)), folder)
        else:
            PIPELINES[name](Maker(options.device, options.tiny)).save_pretrained(folder)
            print(f"wrote {name} in {time.perf_counter() - started:.1f} s", flush=True)


if __name__ == "__main__":
    _cli.start(main)
