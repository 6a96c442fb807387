"""The options of the base model: which one, and how it is held and computed. No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dreamlora.config.ranges import at_least as _at_least
from dreamlora.config.ranges import respell as _respell
from dreamlora.errors import UserError
from dreamlora.registry import check_installed

EMBEDDED_MODEL = "tiny"
LEAST_VRAM, MOST_VRAM = 4, 1024
"""Gigabytes of one GPU."""
Precision = Literal["bf16", "fp8", "int8", "nf4"]
"""Of frozen weights (``precision``)."""
NEEDS: dict[str, str] = {"nf4": "bitsandbytes"}
"""The package that must be installed for some of them, with the extra of that name."""
INSTEAD_OF_QUANTIZED = (
    "files of quantized weights are not read here. Give the model that they were made from, in float32, bfloat16 or "
    "float16; --base_precision (and --text_encoder_precision) nf4, int8 or fp8 holds it in as few bits"
)
"""What is told to whom has weights that others have quantized."""


@dataclass(frozen=True)
class Model:
    """Which model is trained, and how it is held in memory."""

    pretrained_model_name_or_path: str = EMBEDDED_MODEL
    """A diffusers pipeline: a folder, a hub name, a whole model in one .safetensors file, or an embedded model:
    "tiny", or "tiny-flow" for a FLUX in miniature."""
    family: str | None = None
    """Model family; by default read from the pipeline's model_index.json."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository."""
    variant: str | None = None
    """Weight variant of the hub repository, such as fp16."""
    pretrained_vae_model_name_or_path: str | None = None
    """An autoencoder to use instead of the pipeline's own: a folder, a hub name or a .safetensors file."""
    text_encoder_out_layers: tuple[int, ...] = ()
    """Layers of the text encoder that make up FLUX.2's prompts. Default: the pipeline's; diffusers' [klein] script has
    10 20 30."""
    cache_dir: Path | None = None
    """Where downloads from the hub, and what single files are converted to, are kept."""
    allow_pickle: bool = False
    """Accept .bin/.ckpt weights. They can run any code while they load: only for files you trust."""
    gradient_checkpointing: bool = False
    """Trade time for memory: recompute activations in the backward pass."""
    enable_xformers_memory_efficient_attention: bool = False
    """Use xformers' attention instead of torch's own."""
    allow_tf32: bool = False
    """Let Ampere and newer GPUs round fp32 matrix products and convolutions to TF32."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """Precision of the frozen weights and the forward pass; LoRA weights stay fp32. Default: accelerate's setting."""
    base_precision: Precision | None = None
    """Fewer bits for the weights of the frozen denoiser: fp8, int8, nf4 (4 bits, needs bitsandbytes) or bf16. They are
    computed with in --mixed_precision; LoRA and optimizer stay fp32. Default: as --mixed_precision."""
    text_encoder_precision: Precision | None = None
    """The same for the text encoders. Default: as --mixed_precision."""
    text_encoder_device: Literal["cpu"] | None = None
    """Where text encoders that do not train work: cpu spares the GPU, and is slow. Default: with the rest."""
    offload_blocks: int = 0
    """Blocks of the denoiser whose frozen weights wait in the computer's memory and are copied to the GPU ahead of
    their use: that saves the memory of all of them but two, and costs time where copying takes longer than computing.
    Switches --gradient_checkpointing on."""
    vram: str | None = None
    """Gigabytes that the GPU has for the training (such as 8, 12, 24), or auto for all that are free: sets precision,
    checkpointing, offloading, batch and accumulation so that it fits by the estimate that dreamlora doctor shows. Flags
    that are given win."""
    vae_tiling: bool | None = None
    """Have the autoencoder take images in overlapping tiles of at most 512 pixels: less memory, slightly other numbers.
    Default: only where memory does not suffice for a whole image."""
    compile: bool = False
    """Compile the denoiser's repeated blocks with torch.compile: faster steps after a slow first one for each size of
    images. Needs a compiler: g++ on a CPU, Triton on a GPU."""
    attention_backend: str | None = None
    """Attention of the transformer by diffusers' names, such as native, _native_cudnn, flash or xformers; for FLUX,
    Chroma, Qwen-Image, Krea 2 and Z-Image alone. Default: torch's own choice."""
    channels_last: bool = False
    """Keep the denoiser's convolutions (SD, SDXL, Sana) with their channels innermost, which is faster on some
    devices."""

    def __post_init__(self) -> None:
        _at_least(self, 0, "offload_blocks")
        _check_vram(self.vram)
        if self.compile and self.offload_blocks:
            raise UserError(
                "--compile cannot be combined with --offload_blocks: compiled code knows no weights that move. Give "
                "one of them"
            )
        if self.family is not None:
            _respell(self, "family", "families")
        if any(layer < 0 for layer in self.text_encoder_out_layers):
            raise UserError("--text_encoder_out_layers must be at least 0, which are the embeddings of tokens")


def check_package(flag: str, word: str | None) -> None:
    """Nothing, if the package that weights of this precision need is installed.

    Args:
        flag: that asks, for messages.
        word: of ``Precision``; None: as they are.

    Raises:
        UserError: it is not.
    """
    if package := NEEDS.get(word or ""):
        try:
            check_installed((package,), package)
        except UserError as error:
            raise UserError(f"--{flag} {word}: {error}") from None


def _check_vram(vram: str | None) -> None:
    if vram in (None, "auto"):
        return
    try:
        gigabytes = float(vram or "")
    except ValueError:
        gigabytes = 0
    if not LEAST_VRAM <= gigabytes < MOST_VRAM:
        raise UserError(f"--vram must be gigabytes, {LEAST_VRAM} or more, such as 12, or auto (got {vram})")
